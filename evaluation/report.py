# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Summarizes results, which have a row for each picture, to figures with intervals, and writes these as Markdown."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType

import numpy as np
import pandas as pd

from action_units import AU_NAMES, au_columns, whole_au
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
AU_METRIC_NAMES = {"r": "r", "slope": "slope", "au_mse": "MSE", "unrequested": "other AUs move by"}
AU_METRIC_NAMES |= {"other_side": "the other side moves at 5 by"}
PART_NAMES = {
    "neutral": "neutral",
    "single": "single AUs",
    "combination": "combinations",
    "extrapolation": "beyond [0, 5]",
}


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


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

    def add(meter: str, part: str, au: str, metric: str, figure: Figure) -> None:
        rows.append({"meter": meter, "part": part, "au": au, "metric": metric, **asdict(figure)})

    def compute(meter: str, part: str, au: str, metric: str, group: pd.DataFrame, statistic: Callable, *columns):
        figure = bootstrap(statistic, *columns, prompts=group["prompt_index"].to_numpy(), draws=draws)
        add(meter, part, au, metric, figure)

    for part, group in results.drop_duplicates("name").groupby("part", sort=False):
        for metric in PICTURE_METRICS:
            if metric in group and group[metric].notna().any() and (part, metric) != ("neutral", "clip_i"):
                statistic = np.median if metric == "seconds" else np.mean
                compute("", part, "", metric, group, statistic, group[metric].to_numpy(float))
    for meter, table in by_meter(results):
        for part, group in table.groupby("part", sort=False):
            missing = int((group["num_faces"] == 0).sum())
            add(meter, part, "", "no_face", Figure(missing, missing, missing, len(group), 0))
        for part, au, metric, *computed in _statistics(with_neutral(without_unmeasured(table))):
            compute(meter, part, au, metric, *computed)
    return pd.DataFrame(rows).rename(columns={"num_pictures": "pictures", "num_prompts": "prompts"})


def by_meter(results: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """The rows of each meter, by its name."""
    return results[results["meter"] != ""].groupby("meter", sort=False)


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
    neutral = found[found["part"] == "neutral"].set_index("prompt_index").filter(regex="^measured_")
    return found.join(neutral.rename(columns=lambda name: name.replace("measured_", "neutral_")), on="prompt_index")


def intensities(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Commanded and measured intensities, and those of the neutral face, of what `with_neutral` returns."""
    au_names = commanded_aus(table)
    kinds = ("", "measured_", "neutral_")
    return tuple(table[[f"{kind}{name}" for name in au_names]].to_numpy(float) for kind in kinds)


def _statistics(table: pd.DataFrame) -> Iterator[tuple]:
    """Yield part, AU ("" for all), metric, the pictures that it is computed from, the statistic, and its columns."""
    for part in ("single", "combination"):
        group = table[table["part"] == part]
        if not group.empty:
            for metric, *computed in _overall_statistics(group, part):
                yield part, "", metric, *computed
            for column, au in enumerate(commanded_aus(table)):
                chosen = group if part == "combination" else group[group[au] != 0]
                if not chosen.empty:
                    for metric, *computed in _au_statistics(chosen, part, column):
                        yield part, au, metric, *computed
    if (table["part"] == "extrapolation").any():
        alone = table[table["part"].isin(("single", "extrapolation"))]
        for column, au in enumerate(commanded_aus(table)):
            for metric, *computed in _extrapolation_statistics(alone[alone[au] != 0], column):
                yield "extrapolation", au, metric, *computed


def _overall_statistics(group: pd.DataFrame, part: str) -> Iterator[tuple]:
    commanded, measured, neutral = intensities(group)
    easy = ~is_hard(commanded_aus(group))
    errors = au_mse(commanded, measured)
    yield "au_mse", group, np.mean, errors
    # If a hard AU was commanded alone, its picture is left out; in a combination, only its column is.
    kept = (commanded[:, ~easy] == 0).all(axis=1) | (part == "combination")
    yield "au_mse_easy", group[kept], np.mean, au_mse(commanded[:, easy], measured[:, easy])[kept]
    for domain in ("in", "out"):
        of_domain = (group["domain"] == domain).to_numpy()
        if of_domain.any():
            yield f"au_mse_{domain}", group[of_domain], np.mean, errors[of_domain]
    yield "au_mse_neutral", group, np.mean, au_mse(commanded, neutral)
    yield "unrequested", group, np.mean, unrequested_movement(commanded, measured, neutral)
    for metric, function in (("r", pearson), ("slope", slope)):
        statistic = _mean_over_aus(function, only_where_commanded=part == "single")
        yield metric, group, statistic, commanded, measured
        yield f"{metric}_easy", group, statistic, commanded[:, easy], measured[:, easy]


def _mean_over_aus(function: Callable, only_where_commanded: bool) -> Callable[[np.ndarray, np.ndarray], float]:
    """Make a statistic: the mean of `function(commanded, measured)` over the AUs for which it is defined."""

    def statistic(commanded: np.ndarray, measured: np.ndarray) -> float:
        values = []
        for x, y in zip(commanded.T, measured.T, strict=True):
            if only_where_commanded:
                x, y = x[x != 0], y[x != 0]
            if len(x) > 1:
                values.append(function(x, y))
        values = [value for value in values if not np.isnan(value)]
        return float(np.mean(values)) if values else float("nan")

    return statistic


def _au_statistics(group: pd.DataFrame, part: str, column: int) -> Iterator[tuple]:
    commanded, measured, neutral = intensities(group)
    x, y = commanded[:, column], measured[:, column]
    yield "r", group, pearson, x, y
    yield "slope", group, slope, x, y
    yield "au_mse", group, np.mean, au_mse(commanded, measured) if part == "single" else np.square(y - x)
    if part == "single":
        yield "unrequested", group, np.mean, unrequested_movement(commanded, measured, neutral)
        names, full = commanded_aus(group), x == 5
        for other in au_columns(names)[whole_au(names[column])]:
            if other != column and full.any():
                moved = np.abs(measured - neutral)[full, other]
                yield "other_side", group[full], np.mean, moved


def _extrapolation_statistics(group: pd.DataFrame, column: int) -> Iterator[tuple]:
    commanded, measured, neutral = intensities(group)
    x, moved = commanded[:, column], (measured - neutral)[:, column]
    yield "r", group, pearson, x, moved
    yield "slope", group, slope, x, moved
    for value in sorted({min(x), 5, max(x)}):
        if (x == value).any():
            yield f"change_at_{value:g}", group[x == value], np.mean, moved[x == value]


# --------------------------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------------------------


def find_figure(summary: pd.DataFrame, metric: str, part: str, meter: str = "", au: str = "") -> Figure:
    """Find one figure in the table of `summarize`. `NO_FIGURE` if it is not there."""
    # In a table that was read from a file, empty texts are NaN.
    keys = {"metric": metric, "part": part, "meter": meter, "au": au}
    is_it = [summary[name].to_numpy(object, na_value="") == text for name, text in keys.items()]
    rows = summary[np.logical_and.reduce(is_it)]
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
    lines = ["# Does it obey?", "", ", ".join(f"`{name}={settings[name]}`" for name in names) + ".", ""]
    lines += ["A figure is followed by the interval that holds 95 % of its bootstrap over prompts and pictures."]
    if agreement_name:
        lines += [f"Agreement with the prompt is: {agreement_name}."]
    parts = [part for part in PART_NAMES if (summary["part"] == part).any()]
    lines += ["", "## Pictures", "", *_metric_table(summary, PICTURE_METRICS, parts, "")]
    for meter in filter(None, summary["meter"].unique()):
        lines += ["", f"## Measured by {meter}", "", _face_sentence(summary, meter), ""]
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
    figures = {metric: row for metric, row in figures.items() if any(figure.num_pictures for figure in row)}
    if not figures:
        return ["Nothing was measured."]
    rows = [[METRIC_NAMES[metric], *(f"{figure:.3f}" for figure in row)] for metric, row in figures.items()]
    counts = [str(max(figure.num_pictures for figure in column)) for column in zip(*figures.values(), strict=True)]
    return markdown_table(["", *(PART_NAMES[part] for part in parts)], [*rows, ["pictures", *counts]])


def _face_sentence(summary: pd.DataFrame, meter: str) -> str:
    rows = summary[(summary["metric"] == "no_face") & (summary["meter"] == meter)]
    missing, total = int(rows["value"].sum()), int(rows["pictures"].sum())
    if not missing:
        return f"A face was found in each of the {total} pictures."
    return f"No face was found in {missing} of {total} pictures. They are in none of the figures of this meter."


def _au_table(summary: pd.DataFrame, part: str, meter: str) -> list[str]:
    rows = summary[(summary["part"] == part) & (summary["meter"] == meter) & (summary["au"] != "")]
    if rows.empty:
        return []
    metrics = list(rows["metric"].unique())
    header = [AU_METRIC_NAMES.get(metric, metric.replace("_", " ")) for metric in metrics]
    body = []
    for au in rows["au"].unique():
        figures = [find_figure(summary, metric, part, meter, au) for metric in metrics]
        body.append([au, *(f"{figure}" for figure in figures), str(figures[0].num_pictures)])
    return ["", f"### Each AU: {PART_NAMES[part]}", "", *markdown_table(["AU", *header, "pictures"], body)]
