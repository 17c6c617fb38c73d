"""analyse.py: its numbers by hand, the table, analysis.json, every kind of layer, and one line for what it refuses."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from translation_helpers import (
    SMALL,
    batches,
    checkpoint,
    corpus,
    inference,
    log_values,
    one_line,
    options,
    prepare,
    program,
    scores,
    train,
    training,
)

import depthlstm_fast as dl

analyse = program("analyse")
GREEDY = ("--beam-size", "1")


def dev_loss(model: Any, prepared: corpus.Corpus) -> float:
    """Cross entropy of the dev set, a sentence at a time."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for source, target in prepared.examples["dev"]:
            logits = model(torch.tensor([source]), torch.tensor([target[:-1]]))
            total += float(torch.nn.functional.cross_entropy(logits[0], torch.tensor(target[1:]), reduction="sum"))
            tokens += len(target) - 1
    return total / tokens


def test_numbers_by_hand(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # what has not learned translates at length
    monkeypatch.setattr(analyse, "translate_all", functools.partial(inference.translate_all, max_length=6))
    run, data = own / "run", own / "corpus"
    before = sorted(path.name for path in run.iterdir())
    arguments = [str(run), str(data), "--scope", "layer", "cell", "--tune", "3", "--bleu", "test", *GREEDY]
    assert analyse.main(arguments) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == sorted([*before, "analysis.json"])
    found = json.loads((run / "analysis.json").read_text(encoding="utf-8"))
    assert (found["checkpoint"], found["seed"], found["settings"]["d_model"]) == ("checkpoint-00000004", 0, 16)
    assert found["options"]["bleu"] == "test"

    prepared = corpus.load_corpus(data)
    model, subwords = checkpoint.load_model(run)
    logged = [line["dev_loss"] for line in log_values(run) if "dev_loss" in line][-1]
    assert found["full"]["dev_loss"] == pytest.approx(logged) == pytest.approx(dev_loss(model, prepared))
    pairs = [batches.collate(rows) for rows in batches.group(prepared.examples["train"], 1000)]
    fit = [(pair.source, pair.target) for pair in pairs]
    dev = [tuple(batches.collate(prepared.examples["dev"])[:2])]
    places = [(row["stack"], row["layer"], row["scope"]) for row in found["layers"]]
    assert places == [(stack, 0, scope) for stack in ("encoder", "decoder") for scope in ("layer", "cell")]
    lines, references = zip(*prepared.texts["test"], strict=True)
    for row in found["layers"]:
        where = {"stack": row["stack"], "layer": row["layer"], "scope": row["scope"], "held_out": dev}
        side = 0 if row["stack"] == "encoder" else 1
        assert row["tokens"] == sum(len(each[side]) - side for each in prepared.examples["train"])
        for kind, more in (("ridge", {}), ("dropped", {"drop": True})):
            made = dl.linearise(model, fit, **where, **more)
            assert row[kind]["dev_loss"] == pytest.approx(dev_loss(made.model.eval(), prepared), rel=1e-4)
            for part, r2 in made.r2.items():
                assert row[kind]["r2"][part] == pytest.approx(r2, rel=1e-3)
            translations = inference.translate_all(made.model, subwords, lines, max_length=6)
            assert row[kind]["bleu"] == scores.corpus_scores(translations, references)[0].value
        assert len(row["tuned"]["kl"]) == 3
        assert row["tuned"]["dev_loss"] != row["ridge"]["dev_loss"]
        assert f"{row['ridge']['dev_loss']:.4f} {row['ridge']['dev_loss'] - found['full']['dev_loss']:+.4f}" in printed
    assert "BLEU dropped" in printed
    assert f"dev cross entropy {logged:.4f}" in printed
    # a run with an analysis goes on
    assert train.main([str(data), "--output", str(run), *options(replace(SMALL, steps=5)), *GREEDY]) == 0


def test_it_gives_the_same_numbers_again_and_on_fewer_tokens(own: Path) -> None:
    run, data = own / "run", own / "corpus"
    first, second = analyse.analyse(run, data), analyse.analyse(run, data)
    assert first == second
    assert "tuned" not in first["layers"][0]
    assert "bleu" not in first["full"]
    settings = training.Settings(**first["settings"])
    chosen = analyse.fitting_batches(corpus.load_corpus(data), settings, 1)
    order = batches.BatchOrder(corpus.load_corpus(data).examples["train"], settings.token_budget, settings.seed)
    assert len(chosen) == 1
    assert torch.equal(chosen[0].target, batches.collate(order[0]).target)
    assert len(analyse.fitting_batches(corpus.load_corpus(data), settings, 10**9)) == order.per_epoch


def test_on_some_pairs_of_the_dev_set(own: Path) -> None:
    prepared = corpus.load_corpus(own / "corpus")
    model, _ = checkpoint.load_model(own / "run")
    found = analyse.analyse(own / "run", own / "corpus", dev_pairs=1)
    first = replace(prepared, examples={**prepared.examples, "dev": prepared.examples["dev"][:1]})
    assert found["full"]["dev_loss"] == pytest.approx(dev_loss(model, first))
    assert found["full"]["dev_loss"] != pytest.approx(dev_loss(model, prepared))
    with pytest.raises(ValueError, match="dev_pairs must be at least 1; found 0"):
        analyse.analyse(own / "run", own / "corpus", dev_pairs=0)


@pytest.mark.parametrize("connection", ["pre-norm", "post-norm", "depth-lstm", "depth-gru", "siamese", "dlcl"])
def test_every_connection(
    connection: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(architecture: str, arguments: dict[str, Any], backend: str | None = None) -> Any:
        kept = {name: value for name, value in arguments.items() if name != "forget_bias"}
        return dl.Transformer(**kept, connection=connection)

    monkeypatch.setattr(training, "build_architecture", build)
    monkeypatch.setattr(train, "score_test_set", lambda *_: [])  # what has not learned translates at length
    run = tmp_path / "run"
    settings = options(replace(SMALL, steps=2, architecture="pre-norm"))
    assert train.main([str(folder), "--output", str(run), *settings, *GREEDY]) == 0
    if connection == "dlcl":
        assert "found DLCL, which keeps earlier outputs" in one_line(analyse, [run, folder], capsys)
        return
    assert analyse.main([str(run), str(folder), "--scope", "cell", "layer"]) == 0
    found = json.loads((run / "analysis.json").read_text(encoding="utf-8"))
    parts = {row["stack"]: list(row["ridge"]["r2"]) for row in found["layers"] if row["scope"] == "cell"}
    if connection in ("depth-lstm", "depth-gru"):
        assert parts == {"encoder": ["self_attention"], "decoder": ["added_attention"]}
    else:
        assert parts == {"encoder": ["feed_forward"], "decoder": ["feed_forward"]}


def test_what_is_refused(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data, other = own / "run", own / "corpus", tmp_path / "other"
    prepare.prepare(other, "builtin", vocab_size=120, seed=1)
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "none", data], "run must be a folder that train.py --output wrote"),
        ([run, tmp_path / "none"], "data must be a folder that prepare.py wrote"),
        ([run, other], f"data must be the folder that {run} was trained on; found another text in {other}"),
        ([run, data, "--tokens", "0"], "tokens must be at least 1; found 0"),
        ([run, data, "--tokens", "40"], "batches must hold at least 320 tokens, 20 for each feature; found "),
        ([run, data, "--tune", "-1"], "tune must be at least 0; found -1"),
        ([run, data, "--beam-size", "0"], "beam_size must be at least 1; found 0"),
        ([run, data, "--ridge", "0"], "ridge must be above 0; found 0"),
        ([run, data, "--device", "nowhere"], "device must be one that torch can use here; found 'nowhere'"),
    ]
    for arguments, message in cases:
        assert message in one_line(analyse, arguments, capsys)
    model, subwords = checkpoint.load_model(run)
    model.encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2), 1, enable_nested_tensor=False)
    monkeypatch.setattr(analyse, "load_model", lambda *_: (model, subwords))
    wanted = (
        "architecture must have layers of depthlstm_fast to be analysed; found 'depth-lstm', whose layers are torch"
    )
    assert wanted in one_line(analyse, [run, data], capsys)
    assert not (run / "analysis.json").exists()
