# SPDX-License-Identifier: Apache-2.0
"""Summarizes results, which have a row for each picture, to figures with intervals, and writes these as Markdown."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple

import numpy as np
import pandas as pd

from action_units import au_columns, whole_au
from evaluation import metrics


SUMMARY_COLUMNS = ["meter", "part", "au", "metric", "value", "low", "high", "pictures", "prompts"]
PICTURE_METRICS = ("clip_i", "agreement", "outside", "reference_similarity", "seconds")
WITHOUT_HARD = " without " + ", ".join(metrics.HARD_AUS)
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


# ---- Figures --------------------------------------------------------------------------------------------------------


def summarize(results: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """
    Compute all figures of a run, from a row for each picture and meter, as `evaluation.run` writes them, with so many
    bootstrap `draws`. The result has the columns `SUMMARY_COLUMNS`, where `au` is "" for all together. The metric
    `no_face` counts pictures in which the meter found no face. They are in no other figure.
    """
    rows = []

    def add(meter: str, part: str, au: str, metric: str, group: pd.DataFrame, statistic: Callable, *columns) -> None:
        figure = metrics.bootstrap(statistic, *columns, prompts=group["prompt_index"].to_numpy(), draws=draws)
        rows.append((meter, part, au, metric, *astuple(figure)))

    for part, group in results.drop_duplicates("name").groupby("part", sort=False):
        for metric in PICTURE_METRICS:
            if metric in group and group[metric].notna().any() and (part, metric) != ("neutral", "clip_i"):
                statistic = np.median if metric == "seconds" else np.mean
                add("", part, "", metric, group, statistic, group[metric].to_numpy(float))
    for meter, table in by_meter(results):
        for part, group in table.groupby("part", sort=False):
            missing = (group["num_faces"] == 0).sum()
            rows.append((meter, part, "", "no_face", missing, missing, missing, len(group), 0))
        for computed in _statistics(with_neutral(table)):
            add(meter, *computed)
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


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


def with_neutral(table: pd.DataFrame) -> pd.DataFrame:
    """
    Prepare the rows of one meter: leave out AUs that it does not read, pictures that command one of them, and pictures
    without a face, and add its readings of the neutral face of each prompt: `neutral_…`.
    """
    unmeasured = unmeasured_aus(table)
    found = table[(table["num_faces"] > 0) & (table[unmeasured] == 0).all(axis=1)]
    found = found.drop(columns=[*unmeasured, *(f"measured_{name}" for name in unmeasured)])
    neutral = found[found["part"] == "neutral"].set_index("prompt_index").filter(regex="^measured_")
    return found.join(neutral.rename(columns=lambda name: name.replace("measured_", "neutral_")), on="prompt_index")


def intensities(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Commanded and measured intensities, and those of the neutral face, of what `with_neutral` returns."""
    au_names = commanded_aus(table)
    kinds = ("", "measured_", "neutral_")
    return tuple(table[[f"{kind}{name}" for name in au_names]].to_numpy(float) for kind in kinds)


def _statistics(table: pd.DataFrame) -> Iterator[tuple]:
    """Yield part, AU ("" for all), metric, the pictures, the statistic, and its columns; NaN leaves a picture out."""
    for part in ("single", "combination", "extrapolation"):
        group = table[table["part"] == part]
        if group.empty:
            continue
        if part == "extrapolation":
            group = table[table["part"].isin(("single", part))]
        else:
            for metric, *computed in _overall_statistics(group, part):
                yield part, "", metric, group, *computed
        for column, au in enumerate(commanded_aus(table)):
            chosen = group if part == "combination" else group[group[au] != 0]
            if not chosen.empty:
                for metric, *computed in _au_statistics(chosen, part, column):
                    yield part, au, metric, chosen, *computed


def _overall_statistics(group: pd.DataFrame, part: str) -> Iterator[tuple]:
    commanded, measured, neutral = intensities(group)
    easy = ~metrics.is_hard(commanded_aus(group))
    errors = metrics.au_mse(commanded, measured)
    yield "au_mse", np.mean, errors
    # If a hard AU was commanded alone, its picture is left out; in a combination, only its column is.
    kept = (commanded[:, ~easy] == 0).all(axis=1) | (part == "combination")
    yield "au_mse_easy", np.mean, np.where(kept, metrics.au_mse(commanded[:, easy], measured[:, easy]), np.nan)
    for domain in ("in", "out"):
        of_domain = (group["domain"] == domain).to_numpy()
        if of_domain.any():
            yield f"au_mse_{domain}", np.mean, np.where(of_domain, errors, np.nan)
    yield "au_mse_neutral", np.mean, metrics.au_mse(commanded, neutral)
    yield "unrequested", np.mean, metrics.unrequested_movement(commanded, measured, neutral)
    for metric, function in (("r", metrics.pearson), ("slope", metrics.slope)):
        statistic = _mean_over_aus(function, only_where_commanded=part == "single")
        yield metric, statistic, commanded, measured
        yield f"{metric}_easy", statistic, commanded[:, easy], measured[:, easy]


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
    moved = measured - neutral
    x, y = commanded[:, column], (moved if part == "extrapolation" else measured)[:, column]
    yield "r", metrics.pearson, x, y
    yield "slope", metrics.slope, x, y
    if part == "combination":
        yield "au_mse", np.mean, np.square(y - x)
    elif part == "single":
        yield "au_mse", np.mean, metrics.au_mse(commanded, measured)
        yield "unrequested", np.mean, metrics.unrequested_movement(commanded, measured, neutral)
        names = commanded_aus(group)
        for other in au_columns(names)[whole_au(names[column])]:
            if other != column and (x == 5).any():
                yield "other_side", np.mean, np.where(x == 5, np.abs(moved[:, other]), np.nan)
    else:
        for value in sorted({min(x), 5, max(x)}):
            if (x == value).any():
                yield f"change_at_{value:g}", np.mean, np.where(x == value, y, np.nan)


# ---- Markdown -------------------------------------------------------------------------------------------------------


def find_figure(summary: pd.DataFrame, metric: str, part: str, meter: str = "", au: str = "") -> metrics.Figure:
    """Find one figure in the table of `summarize`. `NO_FIGURE` if it is not there."""
    # In a table that was read from a file, empty texts are NaN.
    keys = {"metric": metric, "part": part, "meter": meter, "au": au}
    is_it = [summary[name].to_numpy(object, na_value="") == text for name, text in keys.items()]
    rows = summary[np.logical_and.reduce(is_it)]
    return metrics.NO_FIGURE if rows.empty else metrics.Figure(*rows.iloc[0][SUMMARY_COLUMNS[4:]])


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def format_report(
    summary: pd.DataFrame,
    settings: dict,
    agreement_name: str,
    pictures: list[str],
    unmeasured: Mapping[str, Sequence[str]],
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


def _metric_table(summary: pd.DataFrame, names: Iterable[str], parts: list[str], meter: str) -> list[str]:
    figures = {metric: [find_figure(summary, metric, part, meter) for part in parts] for metric in names}
    figures = {metric: row for metric, row in figures.items() if any(figure.pictures for figure in row)}
    if not figures:
        return ["Nothing was measured."]
    rows = [[METRIC_NAMES[metric], *(f"{figure:.3f}" for figure in row)] for metric, row in figures.items()]
    counts = [str(max(figure.pictures for figure in column)) for column in zip(*figures.values(), strict=True)]
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
    names = list(rows["metric"].unique())
    header = [AU_METRIC_NAMES.get(metric, metric.replace("_", " ")) for metric in names]
    body = []
    for au in rows["au"].unique():
        figures = [find_figure(summary, metric, part, meter, au) for metric in names]
        body.append([au, *(f"{figure}" for figure in figures), str(figures[0].pictures)])
    return ["", f"### Each AU: {PART_NAMES[part]}", "", *markdown_table(["AU", *header, "pictures"], body)]
