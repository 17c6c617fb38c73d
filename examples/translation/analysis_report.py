"""Write what analyse.py found of several runs as a page: every number comes from their JSON.

    python examples/translation/analysis_report.py run-depth-lstm run-pre-norm --docs docs

This command writes linearisation.md and linearisation.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import StatisticsError, mean
from typing import Any

import command
from checkpoint import LOG
from corpus.files import DamagedError, read_json, to_json
from study.report import table

ANALYSIS = "analysis.json"
PAGE, DATA = "linearisation.md", "linearisation.json"
STACKS = ("encoder", "decoder")
SHARED = ("d_model", "heads", "layers", "steps", "token_budget", "dropout", "label_smoothing", "learning_rate")
Analysis = dict[str, Any]


def read_run(run: Path) -> Analysis:
    """Return the analysis of a run, with the scores that its training ended with; nothing names the folder."""
    source = run / ANALYSIS
    if not source.is_file():
        raise ValueError(f"run must be a folder that analyse.py was given; found no {ANALYSIS} in {run}")
    found: Analysis = {name: value for name, value in read_json(source).items() if name != "run"}
    lines = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    found["test"] = {line["test"]: line["value"] for line in lines if "test" in line}
    found["copied"] = {line["test"]: line["copied"] for line in lines if "test" in line}
    return found


def name_of(analysis: Analysis) -> str:
    architecture: str = analysis["settings"]["architecture"]
    return "depth-wise LSTM" if architecture == "depth-lstm" else architecture


def rises(analysis: Analysis, kind: str, stack: str) -> list[float]:
    """By how much dev cross entropy rises for each layer of a stack that is replaced."""
    rows = [row for row in analysis["layers"] if row["stack"] == stack]
    return [row[kind]["dev_loss"] - analysis["full"]["dev_loss"] for row in rows]


def averages(analysis: Analysis) -> list[str]:
    """A row of the table of averages, by stack: the map's rise, the rise without the layer, and what the map keeps."""
    cells = []
    for stack in STACKS:
        fitted, dropped = (mean(rises(analysis, kind, stack)) for kind in ("ridge", "dropped"))
        cells += [f"{fitted:+.3f}", f"{dropped:+.3f}", f"{1 - fitted / dropped:.0%}" if dropped > 0 else "-"]
    return [name_of(analysis), *cells]


def answer(analyses: list[Analysis]) -> list[str]:
    """The two sentences that answer the paper's question."""
    said = []
    for stack, question in zip(
        STACKS, ("A linear map in place of an encoder layer", "In place of a decoder layer it"), strict=True
    ):
        found = [
            f"{mean(rises(each, 'ridge', stack)):.3f} nats in the {name_of(each)} "
            f"(leaving it out: {mean(rises(each, 'dropped', stack)):.3f})"
            for each in analyses
        ]
        said.append(f"{question} costs {' and '.join(found)}, on average.")
    return said


def evaluated(chosen: int | None, pairs: int) -> str:
    """Say what losses and R^2 are of."""
    of = f"the {pairs:,} dev pairs" if chosen is None else f"the first {chosen:,} of the {pairs:,} dev pairs"
    return f"Dev cross entropy, in nats a target token, and R^2 are of {of}."


def untrained(analyses: list[Analysis]) -> list[str]:
    """Say so where the translations are worse than the sources."""
    if not all(each["test"]["BLEU"] < each["copied"]["BLEU"] for each in analyses):
        return []
    return [
        "None of them translates: their BLEU is below that of the copied source.",
        "BLEU with a layer replaced would rank noise, so that dev cross entropy alone is shown.",
    ]


def explained(analysis: Analysis, row: dict[str, Any], kind: str) -> list[str]:
    """R^2 of each tensor of the state that a layer leaves."""
    found = [each for values in row[kind]["r2"].values() for each in values]
    return ["-" if each is None else f"{each:.3f}" for each in found]


def of_model(analysis: Analysis) -> str:
    """The table of a model's layers."""
    full = analysis["full"]["dev_loss"]
    tensors = len(explained(analysis, analysis["layers"][0], "ridge"))
    names = ["h", "c"] if tensors == 2 else ["x"]
    head = ["layer", *(f"R^2 of {name}" for name in names), "dev loss", "rise"]
    head += [*(f"dropped: R^2 of {name}" for name in names), "dev loss", "rise"]
    rows = []
    for row in analysis["layers"]:
        cells = [f"{row['stack']} {row['layer'] + 1}"]
        for kind in ("ridge", "dropped"):
            loss = row[kind]["dev_loss"]
            cells += [*explained(analysis, row, kind), f"{loss:.3f}", f"{loss - full:+.3f}"]
        rows.append(cells)
    return table(head, rows)


def markdown(found: dict[str, Any]) -> str:
    """Return the page of what ``main`` wrote as JSON."""
    analyses: list[Analysis] = found["models"]
    first, settings, options = analyses[0], analyses[0]["settings"], analyses[0]["options"]
    data = first["data"]
    for each in analyses[1:]:
        if any(each["settings"][name] != settings[name] for name in SHARED) or each["data"] != data:
            raise ValueError("run must have the size, the data and the settings of the first; found another")
    lines = [
        "# How much of a trained layer is linear",
        "",
        f"Made by `examples/translation/analysis_report.py` from [{DATA}]({DATA}).",
        "That file is what `examples/translation/analyse.py` found of each of these models.",
        "No number below is typed by hand.",
        "",
        "Tables 6 and 7 of the paper (arXiv 2007.06257) ask what is lost where a layer becomes a linear map.",
        "",
        *answer(analyses),
        *(["What another model of this size loses is not measured."] if len(analyses) == 1 else []),
        "",
        "## The models",
        "",
        f"All have {settings['layers']} + {settings['layers']} layers, d = {settings['d_model']} and "
        f"{settings['heads']} heads.",
        f"They were trained on {data['pairs']['train']:,} pairs ({data['dataset']}), {data['vocabulary']:,} subwords.",
        f"Training took {settings['steps']:,} steps of at most {settings['token_budget']:,} ids, at a learning rate of "
        f"{settings['learning_rate']:g} and dropout {settings['dropout']:g}.",
        "One seed, and one learning rate: it may suit one better than another.",
        "",
        evaluated(options["dev_pairs"], data["pairs"]["dev"]),
        "",
        table(
            ["", "dev cross entropy", "test BLEU", "of the source copied", "test chrF", "of the source copied"],
            [
                [
                    name_of(each), f"{each['full']['dev_loss']:.3f}",
                    *(f"{each[kind][score]:.2f}" for score in each["test"] for kind in ("test", "copied")),
                ]
                for each in analyses
            ],
        ),
        "",
        *untrained(analyses),
        "",
        "## On average",
        "",
        "The rise of dev cross entropy in nats a target token, over the model itself.",
        "\"Kept\" is the share of the dropped layer's rise that the map does without.",
        "",
        table(
            ["", *(f"{stack}: {word}" for stack in STACKS for word in ("map", "dropped", "kept"))],
            map(averages, analyses),
        ),
        "",
    ]  # fmt: skip
    for each in analyses:
        lines += [
            f"## {name_of(each)[0].upper()}{name_of(each)[1:]}",
            "",
            f"Dev cross entropy is {each['full']['dev_loss']:.3f} with every layer.",
            "R^2 is that of each tensor of the state that the layer leaves.",
            "",
            of_model(each),
            "",
        ]
    fitted = sorted({row["tokens"] for each in analyses for row in each["layers"]})
    lines += [
        "## How it was made",
        "",
        f"Each map is (X'X + {options['ridge']:g} I)^-1 X'Y, and is not tuned.",
        f"It was fitted on {' to '.join(f'{number:,}' for number in fitted)} tokens of the training set.",
        "A row replaces one layer alone; the others stay as they were trained.",
        "Pre-norm's state is a residual stream, which a layer mostly copies: hold its R^2 against the dropped layer's.",
        "",
    ]
    return "\n".join(lines)


@command.program("analysis_report.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, write the page, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="folder that analyse.py was given")
    parser.add_argument("--docs", type=Path, required=True, help=f"folder for {PAGE} and {DATA}")
    options = parser.parse_args(arguments)
    found = {"models": [read_run(run) for run in options.runs]}
    try:
        page = markdown(found)
    except (ArithmeticError, AttributeError, LookupError, StatisticsError, TypeError) as error:
        raise DamagedError(
            f"{ANALYSIS} must be what analyse.py wrote; found other values: {type(error).__name__}: {error}"
        ) from None
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / DATA).write_text(to_json(found, indent=1), encoding="utf-8")
    (options.docs / PAGE).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
