# SPDX-License-Identifier: Apache-2.0
"""
The presets and the sliders of a face, as one component of the page. Its value is an expression as `format_aus` writes
it; what it does is in `controls.js`.
"""

import html
from collections.abc import Sequence

import gradio as gr

from action_units import MAX_INTENSITY, ActionUnit, action_units_of, available_presets, format_aus


FACE_PARTS = {
    "Brows and eyes": ("brow", "eye", "gaze"),
    "Cheeks and nose": ("cheek", "nose"),
    "Mouth, chin and jaw": ("mouth", "chin", "jaw"),
    "Head and neck": ("head", "neck"),
}
PLAIN_NAMES = {
    **{"AU1": "Inner brows up", "AU2": "Outer brows up", "AU4": "Frown", "AU5": "Wide eyes", "AU6": "Cheeks up"},
    **{"AU7": "Tight lids", "AU9": "Wrinkled nose", "AU10": "Upper lip up", "AU12": "Smile", "AU13": "Sharp smile"},
    **{"AU14": "Dimples", "AU15": "Mouth corners down", "AU16": "Lower lip down", "AU17": "Chin up", "AU18": "Kiss"},
    **{"AU20": "Wide mouth", "AU22": "Funnel", "AU23": "Tight lips", "AU24": "Pressed lips", "AU25": "Open lips"},
    **{"AU26": "Jaw down", "AU27": "Yawn", "AU28": "Lips sucked in", "AU43": "Closed eyes", "AU45": "Blink"},
}
# Each region on a face of 24 × 30, as somebody who looks at the picture sees it: the person's left is on its right.
REGION_SHAPES = {
    "brow": '<path d="M4.5 9q3-3 6-.5M13.5 8.5q3-2.5 6 .5"/>',
    "eye": '<ellipse cx="8" cy="12.5" rx="2.4" ry="1.2"/><ellipse cx="16" cy="12.5" rx="2.4" ry="1.2"/>',
    "cheek": '<circle cx="6.5" cy="17.5" r="2"/><circle cx="17.5" cy="17.5" r="2"/>',
    "nose": '<path d="M12 13v4.5M10 18q2 1.5 4 0"/>',
    "mouth": '<path d="M7.5 21.5q4.5 4 9 0q-4.5-2-9 0z"/>',
    "chin": '<path d="M9.5 26q2.5 1.8 5 0"/>',
    "jaw": '<path d="M2.5 19q2 9 9.5 9t9.5-9"/>',
    "neck": '<path d="M7 27v3M17 27v3"/>',
    "head": '<ellipse cx="12" cy="15" rx="10" ry="13"/>',
}
REGION_SHAPES["gaze"] = REGION_SHAPES["eye"]
# Neutral, the six basic emotions, and as many as fill their row; the others unfold.
NUM_FIRST_PRESETS = 7
JS = "fineface.face(element, props, (name) => name === 'input' ? trigger('input') : trigger('release'), watch);"


def plain_name(unit: ActionUnit) -> str:
    return PLAIN_NAMES.get(unit.name, unit.facs_name)


def sides_of(unit: ActionUnit, au_names: Sequence[str]) -> list[str]:
    """Its names among those of an adapter: itself, or left and right."""
    return [name for name in (unit.name, f"{unit.name}L", f"{unit.name}R") if name in au_names]


def face_controls(aus: str, au_names: Sequence[str]) -> gr.HTML:
    """
    The component. `input` tells that something moves, `release` that it has come to rest. Pictures of the presets, by
    name, may follow as `pictures`, in JSON: of an object, the browser does not see that it has grown.
    """
    units = action_units_of(au_names)
    parts = ""
    for title, regions in FACE_PARTS.items():
        rows = "".join(_row(unit, sides_of(unit, au_names)) for unit in units if unit.region in regions)
        parts += f'<section class="part"><h3>{title}</h3><div class="rows">{rows}</div></section>' if rows else ""
    return gr.HTML(
        aus,
        html_template=f'<div class="face">{_presets(au_names)}{_MIXER}{parts}</div>',
        js_on_load=JS,
        apply_default_css=False,
        aus=[sides_of(unit, au_names) for unit in units],
        limit=MAX_INTENSITY,
        pictures="{}",
        elem_id="face-controls",
    )


def _presets(au_names: Sequence[str]) -> str:
    buttons = [
        f'<button type="button" class="preset" data-preset="{name}" data-aus="{format_aus(preset, au_names)}"'
        f' aria-pressed="false" title="{html.escape(preset.source)}"><span>{name}</span></button>'
        for name, preset in available_presets(au_names).items()
    ]
    first, more = buttons[:NUM_FIRST_PRESETS], buttons[NUM_FIRST_PRESETS:]
    return (
        f'<div class="presets" role="group" aria-label="Presets">{"".join(first)}</div>'
        f'<details class="more"><summary>{len(more)} more expressions</summary>'
        f'<div class="presets" role="group" aria-label="More presets">{"".join(more)}</div></details>'
    )


_MIXER = (
    '<div class="mixer"><label class="strength">Strength <input type="range" min="0" max="2" step="0.05" value="1">'
    "<output>100 %</output></label>"
    '<label><input type="checkbox" class="is-added"> add to this face</label>'
    '<label title="AU12 below 0 turns the corners of the mouth down"><input type="checkbox" class="is-beyond">'
    " beyond 0 and 5</label>"
    '<button type="button" class="reset-all">Reset all</button></div>'
)


def face_map(region: str, side: str = "") -> str:
    """A small face on which the region that an AU moves is marked, or its "left" or "right" side alone."""
    faint = "".join(REGION_SHAPES[name] for name in ("head", "brow", "eye", "nose", "mouth") if name != region)
    x, width, where = {
        "left": (12, 12, ", on the person's left: on the right of the picture"),
        "right": (0, 12, ", on the person's right: on the left of the picture"),
    }.get(side, (0, 24, ""))
    return (
        f'<svg class="map" viewBox="0 0 24 30" role="img" aria-label="moves the {region}{where}">{faint}'
        f'<svg class="moves" x="{x}" width="{width}" height="30" viewBox="{x} 0 {width} 30">'
        f"{REGION_SHAPES[region]}</svg></svg>"
    )


def _row(unit: ActionUnit, names: list[str]) -> str:
    """One AU; of an AU with sides, a slider for each, of which the second is hidden while they are linked."""
    plain, link = plain_name(unit), ""
    if len(names) > 1:
        link = (
            f'<button type="button" class="link" aria-pressed="true" title="Move both sides together"'
            f' aria-label="{plain}: left and right together">L = R</button>'
        )
    return (
        f'<div class="au" id="{unit.name}" data-names="{" ".join(names)}" title="{html.escape(unit.hint)}">'
        f'<div class="head">{face_map(unit.region)}'
        f'<span class="name">{plain} <small>{unit.name} · {unit.facs_name}</small></span>{link}'
        f'<button type="button" class="reset" aria-label="Reset {plain}" title="Back to 0">↺</button></div>'
        f"{''.join(_side(name, plain, unit.region) for name in names)}<div class='problem' role='alert'></div></div>"
    )


def _side(name: str, plain: str, region: str) -> str:
    side = {"L": "left", "R": "right"}.get(name[-1], "")
    letter = f"<b>{name[-1]}{face_map(region, side)}</b>" if side else ""
    label = f"{plain}, {side} ({name})" if side else f"{plain} ({name})"
    return (
        f'<div class="side {side}" data-name="{name}">{letter}'
        f'<input type="range" min="0" max="5" step="0.1" aria-label="{label}">'
        f'<input type="number" step="0.1" aria-label="{label}, as a number"></div>'
    )
