import numpy as np
import torch

from action_units import AU_NAMES, parse_aus
from drawing.labelled_set import DEFAULT_DISTRIBUTION, Distribution, Expressions, draw_dataset, read_distribution


def draw_labels(count: int, seed: int = 0, **changes) -> list[dict]:
    distribution = Distribution("toy", ["a {who}"], {"who": ["boy", "girl"]}, **changes)
    return list(draw_dataset(distribution, count, {"seed": seed})[1].values())


def aus_of(row: dict) -> list[float]:
    return [row[name] for name in AU_NAMES]


def test_a_data_set_is_drawn_as_its_distribution_says():
    smiles = [Expressions(1.0, aus="6+12", intensity=(1, 2))]
    for row in draw_labels(20, expressions=smiles):
        assert all(1 <= row[name] <= 2 if name in ("AU6", "AU12") else row[name] == 0.0 for name in AU_NAMES)
    kinds = [Expressions(3.0, aus="neutral"), Expressions(1.0, count=(2, 3), intensity=(0.5, 5))]
    rows = draw_labels(400, expressions=kinds)
    active = np.count_nonzero([aus_of(row) for row in rows], axis=1)
    assert set(active) == {0, 2, 3} and 0.65 < (active == 0).mean() < 0.85
    assert {name for row in rows for name in AU_NAMES if row[name]} == set(AU_NAMES)
    assert {row["text"] for row in rows} == {"a boy", "a girl"}
    # A larger data set begins as a smaller one; another seed is another data set.
    assert draw_labels(50, expressions=kinds) == rows[:50]
    assert [aus_of(row) for row in draw_labels(50, seed=1, expressions=kinds)] != [aus_of(row) for row in rows[:50]]


def test_a_subject_keeps_face_and_prompt():
    distribution = read_distribution(DEFAULT_DISTRIBUTION)
    jobs, rows = draw_dataset(distribution, 12, {})
    people = {}
    for job, row in zip(jobs.values(), rows.values(), strict=True):
        assert torch.allclose(parse_aus(job.aus)[0], torch.tensor(aus_of(row)), atol=1e-6)
        people.setdefault(row["subject"], set()).add((job.prompt, job.seed))
    assert [len(seen) for seen in people.values()] == [1, 1, 1] and len(set.union(*people.values())) == 3


def test_labels_are_the_numbers_that_were_asked_for():
    row = draw_labels(1, expressions=[Expressions(1.0, aus="AU12=0.3 AU26=1.45")])[0]
    assert (row["AU12"], row["AU26"], row["AU1"]) == (0.3, 1.45, 0.0)


def test_labels_are_of_the_aus_that_the_adapter_knows():
    au_names = ("AU4", "AU12L", "AU12R")
    kinds = [Expressions(1.0, aus="L12C"), Expressions(1.0, count=(1, 1), intensity=(1, 5))]
    distribution = Distribution("toy", ["a boy"], {}, kinds)
    jobs, rows = draw_dataset(distribution, 40, {}, au_names)
    assert {name for row in rows.values() for name in row if name.startswith("AU")} == set(au_names)
    assert "AU12L=3" in {job.aus for job in jobs.values()}
    assert {name for row in rows.values() for name in au_names if row[name]} == set(au_names)
