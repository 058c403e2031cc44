# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Summarizes results, which have a row for each picture, to figures with intervals, and writes these as Markdown."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd

from action_units import AU_NAMES
from evaluation.metrics import (
    HARD_AUS,
    NO_FIGURE,
    Figure,
    au_mse,
    bootstrap,
    is_hard,
    pearson,
    slope,
    unrequested_movement,
)


MEASURED = [f"measured_{name}" for name in AU_NAMES]
"""The columns of measurements for the paper's twelve AUs."""
PICTURE_METRICS = ("clip_i", "agreement", "outside", "reference_similarity", "seconds")
WITHOUT_HARD = " without " + ", ".join(HARD_AUS)
METRIC_NAMES = {
    "au_mse": "AU MSE ↓",
    "au_mse_easy": f"AU MSE{WITHOUT_HARD} ↓",
    "au_mse_in": "AU MSE, prompts in the training domain ↓",
    "au_mse_out": "AU MSE, prompts out of it ↓",
    "au_mse_neutral": "AU MSE of the neutral picture",
    "r": "mean r ↑",
    "r_easy": f"mean r{WITHOUT_HARD} ↑",
    "slope": "mean slope (1 is right)",
    "slope_easy": f"mean slope{WITHOUT_HARD}",
    "unrequested": "other AUs move by ↓",
    "clip_i": "CLIP-I",
    "agreement": "agreement with the prompt ↑",
    "outside": "change outside the face ↓",
    "reference_similarity": "likeness to the image prompt ↑",
    "seconds": "seconds per picture ↓",
}
PART_NAMES = {
    "neutral": "neutral",
    "single": "single AUs",
    "combination": "combinations",
    "extrapolation": "beyond [0, 5]",
}


def summarize(results: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """
    Compute all figures of a run.

    Args:
        results (`pd.DataFrame`):
            A row for each picture and meter, as `evaluation.run` writes them.
        draws (`int`, defaults to 1000):
            The number of bootstrap draws.

    Returns:
        `pd.DataFrame` with the columns `meter`, `part`, `au` ("" for all together), `metric`, `value`, `low`, `high`,
        `pictures`, `prompts`. The metric `no_face` counts pictures in which the meter found no face. They are in no
        other figure.
    """
    rows = []
    for (part, metric), figure in _picture_figures(results, draws):
        rows.append(_row("", part, "", metric, figure))
    for meter, table in results.groupby("meter", sort=False):
        if not meter:
            continue
        for part, group in table.groupby("part", sort=False):
            missing = int((group["num_faces"] == 0).sum())
            rows.append(_row(meter, part, "", "no_face", Figure(missing, missing, missing, len(group), 0)))
        for (part, au, metric), figure in _meter_figures(with_neutral(without_unmeasured(table)), draws):
            rows.append(_row(meter, part, au, metric, figure))
    return pd.DataFrame(rows)


def _row(meter: str, part: str, au: str, metric: str, figure: Figure) -> dict:
    numbers = {"value": figure.value, "low": figure.low, "high": figure.high}
    counts = {"pictures": figure.num_pictures, "prompts": figure.num_prompts}
    return {"meter": meter, "part": part, "au": au, "metric": metric, **numbers, **counts}


def commanded_aus(table: pd.DataFrame) -> list[str]:
    """The AUs of a table of results: the names of its columns of commands."""
    return [name for name in table.columns if re.fullmatch(r"AU[0-9]+[LR]?", name)]


def unmeasured_aus(table: pd.DataFrame) -> list[str]:
    """The AUs that the meter of a table does not read: no picture has a number for them."""
    found = table[table["num_faces"] > 0]
    return [name for name in commanded_aus(table) if len(found) and found[f"measured_{name}"].isna().all()]


def without_unmeasured(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the AUs that the meter of a table does not read, and the pictures that command one of them."""
    unmeasured = unmeasured_aus(table)
    kept = table[(table[unmeasured] == 0).all(axis=1)]
    return kept.drop(columns=[*unmeasured, *(f"measured_{name}" for name in unmeasured)])


def with_neutral(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the pictures in which the meter found a face, and add its readings of their neutral face: `neutral_…`."""
    found = table[table["num_faces"] > 0]
    au_names = commanded_aus(table)
    measured = [f"measured_{name}" for name in au_names]
    neutral = found[found["part"] == "neutral"].set_index("prompt_index")[measured]
    neutral.columns = [f"neutral_{name}" for name in au_names]
    return found.join(neutral, on="prompt_index")


def _picture_figures(results: pd.DataFrame, draws: int) -> Iterator[tuple[tuple[str, str], Figure]]:
    pictures = results.drop_duplicates("name")
    for part, group in pictures.groupby("part", sort=False):
        for metric in PICTURE_METRICS:
            if metric not in group or group[metric].isna().all() or (part, metric) == ("neutral", "clip_i"):
                continue
            statistic = np.median if metric == "seconds" else np.mean
            values = group[metric].to_numpy(float)
            yield (part, metric), bootstrap(statistic, values, prompts=_prompts(group), draws=draws)


def _prompts(group: pd.DataFrame) -> np.ndarray:
    return group["prompt_index"].to_numpy()


def _arrays(group: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    au_names = commanded_aus(group)
    return tuple(
        group[[f"{kind}{name}" for name in au_names]].to_numpy(float) for kind in ("", "measured_", "neutral_")
    )


def _meter_figures(table: pd.DataFrame, draws: int) -> Iterator[tuple[tuple[str, str, str], Figure]]:
    for part in ("single", "combination"):
        group = table[table["part"] == part]
        if group.empty:
            continue
        yield from (((part, "", metric), figure) for metric, figure in _overall_figures(group, part, draws))
        for column, au in enumerate(commanded_aus(table)):
            chosen = group if part == "combination" else group[group[au] != 0]
            yield from (((part, au, metric), f) for metric, f in _au_figures(chosen, column, part, draws))
    beyond = table[table["part"] == "extrapolation"]
    if not beyond.empty:
        whole = table[table["part"].isin(("single", "extrapolation"))]
        for column, au in enumerate(commanded_aus(table)):
            for metric, figure in _extrapolation_figures(whole[whole[au] != 0], column, draws):
                yield ("extrapolation", au, metric), figure


def _overall_figures(group: pd.DataFrame, part: str, draws: int) -> Iterator[tuple[str, Figure]]:
    commanded, measured, neutral = _arrays(group)
    prompts, au_names = _prompts(group), commanded_aus(group)
    hard = is_hard(au_names)

    def mean(values: np.ndarray, rows=slice(None)) -> Figure:
        return bootstrap(np.mean, values[rows], prompts=prompts[rows], draws=draws)

    errors = au_mse(commanded, measured)
    yield "au_mse", mean(errors)
    # If a hard AU was commanded alone, its picture is left out; in a combination, only its column is.
    easy = ~(commanded[:, hard] != 0).any(axis=1) if part == "single" else np.ones(len(group), dtype=bool)
    yield "au_mse_easy", mean(au_mse(commanded, measured, with_hard_aus=False, au_names=au_names), easy)
    for domain in ("in", "out"):
        of_domain = (group["domain"] == domain).to_numpy()
        if of_domain.any():
            yield f"au_mse_{domain}", mean(errors, of_domain)
    yield "au_mse_neutral", mean(au_mse(commanded, neutral))
    yield "unrequested", mean(unrequested_movement(commanded, measured, neutral))
    for metric, function in (("r", pearson), ("slope", slope)):
        for name, columns in ((metric, range(len(au_names))), (f"{metric}_easy", np.flatnonzero(~hard))):
            statistic = _mean_over_aus(function, columns, only_where_commanded=part == "single")
            yield name, bootstrap(statistic, commanded, measured, prompts=prompts, draws=draws)


def _mean_over_aus(function, columns: Iterable[int], only_where_commanded: bool):
    """Make a statistic: the mean of `function(commanded, measured)` over the AUs for which it is defined."""

    def statistic(commanded: np.ndarray, measured: np.ndarray) -> float:
        values = []
        for column in columns:
            rows = commanded[:, column] != 0 if only_where_commanded else slice(None)
            x = commanded[rows, column]
            values.append(function(x, measured[rows, column]) if len(x) > 1 else float("nan"))
        values = [value for value in values if not np.isnan(value)]
        return float(np.mean(values)) if values else float("nan")

    return statistic


def _au_figures(group: pd.DataFrame, column: int, part: str, draws: int) -> Iterator[tuple[str, Figure]]:
    if group.empty:
        return
    commanded, measured, neutral = _arrays(group)
    prompts, x, y = _prompts(group), commanded[:, column], measured[:, column]
    for metric, function in (("r", pearson), ("slope", slope)):
        yield metric, bootstrap(function, x, y, prompts=prompts, draws=draws)
    errors = au_mse(commanded, measured) if part == "single" else np.square(y - x)
    yield "au_mse", bootstrap(np.mean, errors, prompts=prompts, draws=draws)
    if part == "single":
        moved = unrequested_movement(commanded, measured, neutral)
        yield "unrequested", bootstrap(np.mean, moved, prompts=prompts, draws=draws)


def _extrapolation_figures(group: pd.DataFrame, column: int, draws: int) -> Iterator[tuple[str, Figure]]:
    commanded, measured, neutral = _arrays(group)
    prompts, x, moved = _prompts(group), commanded[:, column], (measured - neutral)[:, column]
    for metric, function in (("r", pearson), ("slope", slope)):
        yield metric, bootstrap(function, x, moved, prompts=prompts, draws=draws)
    for value in sorted({min(x), 5, max(x)}):
        rows = x == value
        if rows.any():
            yield f"change_at_{value:g}", bootstrap(np.mean, moved[rows], prompts=prompts[rows], draws=draws)


# --------------------------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------------------------


def find_figure(summary: pd.DataFrame, metric: str, part: str, meter: str = "", au: str = "") -> Figure:
    """Find one figure in the table of `summarize`. `NO_FIGURE` if it is not there."""
    rows = summary[
        (summary["metric"] == metric)
        & (summary["part"] == part)
        & (summary["meter"].astype(object).fillna("") == meter)
        & (summary["au"].astype(object).fillna("") == au)
    ]
    if rows.empty:
        return NO_FIGURE
    row = rows.iloc[0]
    return Figure(row["value"], row["low"], row["high"], int(row["pictures"]), int(row["prompts"]))


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def format_report(
    summary: pd.DataFrame,
    settings: dict,
    agreement_name: str,
    pictures: list[str],
    unmeasured: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """Write the report as Markdown. `unmeasured` has the AUs that a meter does not read, by its name."""
    names = ("system", "model", "adapter", "num_inference_steps", "guidance_scale", "au_guidance_scale", "au_scale")
    chosen = ", ".join(f"`{name}={settings[name]}`" for name in names)
    lines = ["# Does it obey?", "", f"{chosen}.", ""]
    lines += ["A figure is followed by the interval that holds 95 % of its bootstrap over prompts and pictures."]
    if agreement_name:
        lines += [f"Agreement with the prompt is: {agreement_name}."]
    parts = [part for part in PART_NAMES if (summary["part"] == part).any()]
    meters = [meter for meter in summary["meter"].unique() if meter]
    lines += ["", "## Pictures", ""]
    lines += _metric_table(summary, PICTURE_METRICS, parts, "")
    for meter in meters:
        lines += ["", f"## Measured by {meter}", ""]
        lines += _face_sentence(summary, meter)
        if unmeasured.get(meter):
            names = ", ".join(unmeasured[meter])
            lines += [f"It does not read {names}. Pictures that command these are in none of its figures.", ""]
        overall = [name for name in METRIC_NAMES if name not in PICTURE_METRICS]
        lines += _metric_table(summary, overall, [p for p in parts if p in ("single", "combination")], meter)
        for part in parts:
            lines += _au_table(summary, part, meter)
    lines += ["", "## Drawings", "", *(f"![{path}]({path})" for path in pictures)]
    return "\n".join(lines) + "\n"


def _metric_table(summary: pd.DataFrame, metrics: Iterable[str], parts: list[str], meter: str) -> list[str]:
    figures = {metric: [find_figure(summary, metric, part, meter) for part in parts] for metric in metrics}
    rows = [
        [METRIC_NAMES[metric], *(format(figure, ".3f") for figure in row)]
        for metric, row in figures.items()
        if any(figure.num_pictures for figure in row)
    ]
    if not rows:
        return ["Nothing was measured."]
    counts = []
    for part in parts:
        of_part = summary[(summary["part"] == part) & (summary["meter"] == meter) & (summary["au"] == "")]
        of_part = of_part[of_part["metric"] != "no_face"]
        counts.append(f"{of_part['pictures'].max():g}" if len(of_part) else "0")
    return markdown_table(["", *(PART_NAMES[p] for p in parts)], [*rows, ["pictures", *counts]])


def _face_sentence(summary: pd.DataFrame, meter: str) -> list[str]:
    rows = summary[(summary["metric"] == "no_face") & (summary["meter"] == meter)]
    missing, total = int(rows["value"].sum()), int(rows["pictures"].sum())
    if not missing:
        return [f"A face was found in each of the {total} pictures.", ""]
    return [f"No face was found in {missing} of {total} pictures. They are in none of the figures of this meter.", ""]


def _au_table(summary: pd.DataFrame, part: str, meter: str) -> list[str]:
    rows = summary[(summary["part"] == part) & (summary["meter"] == meter) & (summary["au"] != "")]
    if rows.empty:
        return []
    metrics = list(rows["metric"].unique())
    names = {"r": "r", "slope": "slope", "au_mse": "MSE", "unrequested": "other AUs move by"}
    header = [names.get(metric, metric.replace("_", " ")) for metric in metrics]
    body = []
    for au in rows["au"].unique():
        figures = [find_figure(summary, metric, part, meter, au) for metric in metrics]
        body.append([au, *(f"{figure}" for figure in figures), str(figures[0].num_pictures)])
    return ["", f"### Each AU: {PART_NAMES[part]}", "", *markdown_table(["AU", *header, "pictures"], body)]
