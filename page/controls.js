"use strict";
// What happens in the browser, before a server is asked. Texts of expressions are those of `format_aus`.

window.fineface = (() => {
  const UPDATE = "update";
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- Expressions ----------------------------------------------------------------------------------------------

  /** "AU6=3 AU12L=4" as {AU6: 3, AU12L: 4}. */
  function read(text) {
    const items = String(text ?? "").split(" ").filter((item) => item.includes("="));
    return Object.fromEntries(items.map((item) => [item.split("=")[0], Number(item.split("=")[1])]));
  }

  /** Of `aus`, lists such as ["AU6"] and ["AU12L", "AU12R"]: the value of every name. */
  function spread(text, aus) {
    const given = read(text);
    return Object.fromEntries(aus.flat().map((name) => [name, given[name] ?? given[name.replace(/[LR]$/, "")] ?? 0]));
  }

  function write(values, aus) {
    const items = [];
    for (const names of aus) {
      const isOne = names.every((name) => values[name] === values[names[0]]);
      const written = isOne ? [[names[0].replace(/[LR]$/, ""), values[names[0]]]] : names.map((n) => [n, values[n]]);
      items.push(...written.filter(([, value]) => value).map(([name, value]) => `${name}=${value}`));
    }
    return items.join(" ") || "neutral";
  }

  const round = (value) => Math.round(value * 100) / 100;

  // ---- Presets and sliders: one component, whose value is the text ----------------------------------------------

  function face(element, props, trigger, watch) {
    const { aus, limit } = props;
    const at = (selector) => element.querySelector(selector);
    const all = (selector) => [...element.querySelectorAll(selector)];
    const strength = at(".strength input"), isAdded = at(".is-added"), isBeyond = at(".is-beyond");
    let values = spread(props.value, aus);
    // The face to which a preset was added, so that its strength can still change.
    let before = null;
    let waiting = 0;

    const sides = (row) => row.dataset.names.split(" ");

    function tell(isFinal) {
      props.value = write(values, aus);
      trigger("input");
      clearTimeout(waiting);
      // A held arrow key asks for one picture, not for thirty a second.
      if (isFinal) waiting = setTimeout(() => trigger("release"), 200);
    }

    function setRange(beyond) {
      isBeyond.checked = beyond;
      at(".face").classList.toggle("beyond", beyond);
      for (const range of all(".side input[type=range]")) [range.min, range.max] = beyond ? [-limit, limit] : [0, 5];
    }

    function paint() {
      if (Object.values(values).some((value) => value < 0 || value > 5)) setRange(true);
      for (const row of all(".au")) {
        const names = sides(row);
        if (new Set(names.map((name) => values[name])).size > 1) setLinked(row, false);
        names.forEach((name, i) => {
          const [range, number] = all(`.side[data-name="${name}"] input`);
          const value = values[name], share = (number) => (number - range.min) / (range.max - range.min);
          range.value = value;
          if (document.activeElement !== number || Number(number.value) !== value) number.value = value;
          range.style.setProperty("--from", Math.min(share(0), share(value)));
          range.style.setProperty("--to", Math.max(share(0), share(value)));
          range.setAttribute("aria-valuetext", `${value} of 5`);
        });
        row.classList.toggle("moved", names.some((name) => values[name]));
        row.querySelector(".reset").disabled = names.every((name) => !values[name]);
      }
      mark();
    }

    /** How much of a preset the face is: 1 if all of it, 0.5 if half; null if it is another. */
    function shareOf(preset) {
      const wanted = spread(preset, aus), names = aus.flat();
      const [first] = names.filter((name) => wanted[name]);
      if (!first) return names.every((name) => !values[name]) ? 1 : null;
      const share = values[first] / wanted[first];
      if (share !== 1 && Object.keys(read(preset)).length < 2) return null;
      const isAll = names.every((name) => Math.abs(values[name] - share * wanted[name]) < 0.011);
      return isAll && share > 0 && share <= 2 ? share : null;
    }

    function mark() {
      const shares = all(".preset").map((button) => [button, shareOf(button.dataset.aus)]);
      const marked = before ? [at(".preset[aria-pressed=true]"), strength.value]
        : shares.find(([, share]) => share === 1) ?? shares.find(([, share]) => share !== null) ?? [null, null];
      for (const button of all(".preset")) button.setAttribute("aria-pressed", button === marked[0]);
      if (marked[0] && !before && marked[0].dataset.aus !== "neutral") strength.value = round(marked[1]);
      at(".strength output").value = `${Math.round(100 * strength.value)} %`;
    }

    function usePreset(button, isFinal = true) {
      const wanted = spread(button.dataset.aus, aus);
      if (isAdded.checked) before ??= { ...values };
      const base = isAdded.checked ? before : {};
      for (const name of aus.flat())
        values[name] = round(clamp((base[name] ?? 0) + strength.value * wanted[name], -limit, limit));
      all(".preset").forEach((other) => other.setAttribute("aria-pressed", other === button));
      paint();
      tell(isFinal);
    }

    function setLinked(row, isLinked) {
      row.classList.toggle("unlinked", !isLinked);
      row.querySelector(".link")?.setAttribute("aria-pressed", isLinked);
    }

    function move(side, value, isFinal) {
      const row = side.closest(".au");
      const names = row.classList.contains("unlinked") ? [side.dataset.name] : sides(row);
      for (const name of names) values[name] = value;
      before = null;
      paint();
      tell(isFinal);
    }

    function readNumber(side, input, isFinal) {
      const value = input.value === "" ? 0 : Number(input.value);
      const isWrong = !(Math.abs(value) <= limit);
      side.closest(".au").querySelector(".problem").textContent =
        isWrong ? `${side.dataset.name} goes from 0 to 5; to extrapolate, from −${limit} to ${limit}.` : "";
      input.setAttribute("aria-invalid", isWrong);
      if (!isWrong) return move(side, round(value), isFinal);
      if (isFinal) input.value = values[side.dataset.name];
    }

    function onMoved(event, isFinal) {
      const side = event.target.closest(".side");
      if (event.target === strength) {
        const active = at(".preset[aria-pressed=true]");
        if (active) usePreset(active, isFinal); else mark();
      } else if (side && event.target.type === "range") {
        move(side, Number(event.target.value), isFinal);
      } else if (side) {
        readNumber(side, event.target, isFinal);
      } else if (event.target === isBeyond && isFinal) {
        if (!isBeyond.checked) for (const name of aus.flat()) values[name] = clamp(values[name], 0, 5);
        setRange(isBeyond.checked);
        paint();
        tell(true);
      } else if (event.target === isAdded) {
        before = null;
      }
    }

    function onClick(event) {
      const button = event.target.closest("button");
      if (!button) return;
      const row = button.closest(".au");
      if (button.matches(".preset")) {
        // Added to the face as it is now, with all that was added to it.
        before = null;
        usePreset(button);
      } else if (button.matches(".link")) {
        const isLinked = row.classList.contains("unlinked");
        setLinked(row, isLinked);
        if (isLinked) move(row.querySelector(".side"), values[sides(row)[0]], true);
      } else if (button.matches(".reset, .reset-all")) {
        for (const name of row ? sides(row) : aus.flat()) values[name] = 0;
        before = null;
        if (!row) setRange(false);
        paint();
        tell(true);
      }
    }

    function show() {
      values = spread(props.value, aus);
      before = null;
      paint();
    }

    function showPictures() {
      const pictures = JSON.parse(props.pictures);
      for (const button of all(".preset")) {
        const source = pictures[button.dataset.preset];
        if (source && !button.querySelector("img"))
          button.prepend(Object.assign(new Image(), { src: source, alt: "", width: 56, height: 56 }));
      }
    }

    element.addEventListener("input", (event) => onMoved(event, false));
    element.addEventListener("change", (event) => onMoved(event, true));
    element.addEventListener("click", onClick);
    watch(["value"], () => { if (props.value !== write(values, aus)) show(); });
    watch(["pictures"], showPictures);
    show();
    showPictures();
  }

  // ---- Asking for pictures --------------------------------------------------------------------------------------

  const TABS = ["face", "photo", "sweep", "table"];
  const LABELS = { face: "Draw", photo: "Draw photo", sweep: "Draw sweep", table: "Draw table" };
  let opened = "face";
  let last = 0;

  /** A request number above all before it. What is drawn for a lower number of the same tab is out of date. */
  const next = () => (last = Math.max(last + 1, Date.now()));

  /** Give one tab a new request number. */
  function ask(tab, numbers) {
    return TABS.map((name, i) => (name === tab ? next() : numbers[i]));
  }

  const stay = { __type__: UPDATE };

  /** The button, or Enter: draw in the tab that is open. */
  function draw(...numbers) {
    return [...ask(opened, numbers), stay];
  }

  /** Something was moved: draw, if that is wanted, in the tab that shows the face. */
  function touch(isLive, ...numbers) {
    if (!isLive) return [...numbers, stay];
    if (opened === "photo") return [...ask(document.querySelector("#photo img") ? "photo" : "", numbers), stay];
    return [...ask("face", numbers), opened === "face" ? stay : { selected: "face", __type__: UPDATE }];
  }

  /** Draw the face, whatever is open: another person, or another expression. */
  function drawFace(...numbers) {
    return touch(opened !== "photo", ...numbers).slice(0, -1).concat([{ selected: "face", __type__: UPDATE }]);
  }

  /** Which tab is open decides what the button draws, and what it is called. */
  function openTab() {
    const selected = document.querySelector('#stage [role="tab"][aria-selected="true"]')?.innerText.trim().toLowerCase();
    opened = TABS.includes(selected) ? selected : "face";
    return { value: LABELS[opened], __type__: UPDATE };
  }

  /** Dim a picture that is older than the controls, and let the address say what the controls say. */
  function compare(names, defaults, ...values) {
    const drawn = values.pop();
    const now = JSON.stringify(values.map((value) => value ?? ""));
    const isStale = drawn !== "" && JSON.stringify(JSON.parse(drawn).map((value) => value ?? "")) !== now;
    document.querySelector("#stage")?.classList.toggle("stale", isStale);
    const said = Object.fromEntries(names.map((name, i) => [name, values[i] ?? ""]));
    if (said.together) delete said.au_guidance_scale;
    delete said.together;
    const query = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(said))
      if (value === defaults[name]) query.delete(name); else query.set(name, value);
    if (said.au_guidance_scale === undefined) query.delete("au_guidance_scale");
    const search = query.size ? `?${query}` : "";
    if (search !== location.search) history.replaceState(history.state, "", location.pathname + search);
    return [];
  }

  // ---- The box on the photo: dragged on the picture, kept in four number boxes -----------------------------------

  const SIDES = ["left", "top", "right", "bottom"];
  const photo = () => document.querySelector("#photo img");

  function showBox(...box) {
    const image = photo();
    if (!image) return [];
    const frame = image.parentElement;
    const outline = frame.querySelector(".box") ?? frame.appendChild(document.createElement("div"));
    const inner = image.getBoundingClientRect(), outer = frame.getBoundingClientRect();
    const [x, y] = [inner.width / image.naturalWidth, inner.height / image.naturalHeight];
    const [left, top, right, bottom] = box;
    outline.className = "box";
    outline.hidden = box.some((value) => value === null) || right <= left || bottom <= top;
    Object.assign(frame.style, { position: "relative" });
    Object.assign(outline.style, {
      left: `${inner.left - outer.left + left * x}px`, top: `${inner.top - outer.top + top * y}px`,
      width: `${(right - left) * x}px`, height: `${(bottom - top) * y}px`,
    });
    return [];
  }

  const inputs = () => SIDES.map((side) => document.querySelector(`#box-${side} input`));
  const currentBox = () => inputs().map((input) => (input?.value ? Number(input.value) : null));

  function listenToPhoto() {
    let start = null;
    const place = (event) => {
      const image = photo(), inner = image.getBoundingClientRect();
      const share = [(event.clientX - inner.left) / inner.width, (event.clientY - inner.top) / inner.height];
      return [Math.round(clamp(share[0], 0, 1) * image.naturalWidth), Math.round(clamp(share[1], 0, 1) * image.naturalHeight)];
    };
    const between = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
    document.addEventListener("pointerdown", (event) => {
      if (event.target !== photo()) return;
      event.preventDefault();
      start = place(event);
    });
    document.addEventListener("pointermove", (event) => start && showBox(...between(start, place(event))));
    document.addEventListener("pointerup", (event) => {
      if (!start) return;
      const box = between(start, place(event));
      start = null;
      if (box[2] - box[0] < 4 || box[3] - box[1] < 4) return showBox(...currentBox());
      inputs().forEach((input, i) => {
        input.value = box[i];
        input.dispatchEvent(new Event("input", { bubbles: true }));
      });
    });
    window.addEventListener("resize", () => showBox(...currentBox()));
  }
  listenToPhoto();

  return { face, next, ask, draw, touch, drawFace, openTab, compare, showBox };
})();
