"""The verbs. Everything heavy is imported inside the verb, so that `mm --help` answers at once."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mm
from mm.errors import USER_ERRORS, tell

_LIGHTNING_VERBS = ("fit", "validate", "test", "predict")
_DESCRIPTION = """\
Turns medical studies (DICOM volumes, X-rays, sounds, records) into structured, evidence-linked reports,
and trains the models that do it. Research software, not a medical device."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb and exits: 0 done, 1 some study failed, 2 usage, configuration or nothing to do."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if given and given[0] in _LIGHTNING_VERBS:
        # LightningCLI has a grammar of its own (-c, --trainer.max_steps, ...): hand the words on as they are.
        from mm.training.cli import main as lightning_main

        sys.exit(lightning_main(given))
    options = _parser().parse_args(given)
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        code = verb(options)
    except USER_ERRORS as error:
        # Ours say what, where and what would be accepted, and never hold a patient's data.
        print(f"mm: {tell(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("mm: stopped; run the same command again to go on", file=sys.stderr)
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mm {mm.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(verb=run)
        return sub

    for name, text in zip(
        _LIGHTNING_VERBS,
        ("train a model: mm fit -c RECIPE", "score a model on the validation split", "score a model on the test split",
         "run a model over a data set"),
        strict=True,
    ):  # fmt: skip
        verbs.add_parser(name, help=text, add_help=False)

    report = verb("report", _report, "write a report for every study in a folder of DICOM files")
    report.add_argument("directory", metavar="DICOM_DIR", type=Path)
    report.add_argument("-o", "--out", type=Path, required=True, help="folder for the reports")
    report.add_argument("-c", "--config", default="report", help="report, report_ct, report_xray or a YAML file")
    report.add_argument("--context", type=Path, help="JSONL or CSV: record, audio and prior of each study")
    report.add_argument(
        "--language", choices=("en", "zh"), help="the one that comes first in a report; the YAML's order by default"
    )
    report.add_argument("--trust", action="append", default=[], metavar="PKG", help="a package the YAML may import")

    evaluate = verb("evaluate", _evaluate, "score a model beside free baselines")
    evaluate.add_argument("-c", "--config", required=True, help="eval_report, eval_retrieval, eval_vqa, ... or a YAML")
    evaluate.add_argument("-o", "--out", type=Path, default=None, help="folder for results.json, results.md, plot")
    evaluate.add_argument("--trust", action="append", default=[], metavar="PKG", help="a package the YAML may import")
    evaluate.add_argument("--against", type=Path, metavar="results.json", help="an earlier run, to compare with")
    evaluate.add_argument(
        "--audit", action="store_true", help="report, texts, retrieval: which scores notice texts made wrong"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example checkpoint=runs/x studies=50")

    phantom = verb("phantom", _phantom, "make procedural patients with exact truth")
    phantom.add_argument("out", metavar="OUT", type=Path)
    phantom.add_argument("--studies", type=_positive, required=True, help="number of patients (priors come on top)")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--workers", type=_positive, default=1)

    scan = verb("scan", _scan, "list the studies and series of a folder, and every file that is refused")
    scan.add_argument("directory", metavar="DIR", type=Path)
    scan.add_argument("--json", action="store_true", help="print JSON")

    deidentify = verb("deidentify", _deidentify, "copy a folder of DICOM images without who they are of")
    deidentify.add_argument("directory", metavar="IN", type=Path)
    deidentify.add_argument("out", metavar="OUT", type=Path)
    deidentify.add_argument("--secret", type=Path, help="file that pseudonyms follow from, made if missing: OUT.secret")
    deidentify.add_argument(
        "--keep", action="append", default=[], choices=("shifted-dates", "characteristics"), help="may be repeated"
    )
    deidentify.add_argument("--pixels", choices=("ok",), help="you looked: no text in the pixels says who it is")

    volume = verb("volume", _volume, "write every volume of a folder of DICOM files as NIfTI (.nii.gz)")
    volume.add_argument("directory", metavar="DIR", type=Path)
    volume.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    volume.add_argument("--json", action="store_true", help="print a line of JSON for each")

    inspect = verb("inspect", _inspect, "describe a checkpoint")
    inspect.add_argument("checkpoint", nargs="?", default="default", help="a folder, or the name of a shipped one")
    inspect.add_argument("--experts", metavar="PNG", type=Path, help="draw which expert writes about what")

    tokenizer = verb("tokenizer", _tokenizer, "train a byte-level BPE tokenizer on the texts of a data spec")
    tokenizer.add_argument("spec", metavar="SPEC")
    tokenizer.add_argument("-o", "--out", type=Path, required=True)
    tokenizer.add_argument("--vocab-size", type=_positive, default=2048)

    tower = verb("import-tower", _import_tower, "write an image network's weights with timm's names, for TimmEncoder")
    tower.add_argument("source", metavar="FILE", type=Path, help="a state dict of the same network, or .onnx (DINOv2)")
    tower.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.safetensors")
    tower.add_argument("--name", required=True, help="of the timm model, such as tf_efficientnet_lite0")

    data = verb("data", _data, "check a data set before training on it: mm data check SPEC")
    data.add_argument("what", choices=("check",))
    data.add_argument("spec", metavar="SPEC", help="a YAML file, or the name of a shipped data spec")
    data.add_argument("--root", type=Path, help="takes the place of the spec's own root folder")
    data.add_argument("--json", action="store_true", help="print JSON")
    data.add_argument("--html", metavar="FILE", type=Path, help="write a page of samples; it shows texts and images")

    taken = verb("import-decoder", _import_decoder, "take an open language model as a decoder")
    taken.add_argument("path", metavar="PATH", type=Path, help="a Hugging Face folder or a .gguf file")
    taken.add_argument("-o", "--out", type=Path, required=True, help="a new or empty folder")
    taken.add_argument("--experts", type=_positive, help="make so many experts of every feed-forward of a dense model")
    taken.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; as they are by default")

    given = verb("export-decoder", _export_decoder, "write a decoder for other programs")
    given.add_argument("folder", metavar="FOLDER", type=Path, help="written by mm import-decoder")
    given.add_argument("-o", "--out", type=Path, required=True, help="a new or empty folder")
    given.add_argument("--format", choices=("huggingface",), default="huggingface")

    demo = verb("demo", _demo, "make four phantom studies and report them")
    demo.add_argument("-o", "--out", type=Path, default=Path("mm-demo"))
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _report(options: argparse.Namespace) -> int:
    from mm.pipeline.run import run_report

    return run_report(
        options.directory,
        options.out,
        pipeline=options.config,
        context=options.context,
        language=options.language,
        trust=tuple(options.trust),
    )


def _evaluate(options: argparse.Namespace) -> int:
    from mm.evaluation.evaluate import run_evaluation

    out = options.out or Path("runs") / Path(options.config).stem
    overrides, trust = (*options.overrides, *(("audit=true",) if options.audit else ())), tuple(options.trust)
    print(run_evaluation(options.config, out, overrides=overrides, trust=trust, against=options.against))
    print(f"written to {out}")
    return 0


def _phantom(options: argparse.Namespace) -> int:
    from mm.phantom.write import write_studies

    write_studies(options.out, studies=options.studies, seed=options.seed, workers=options.workers)
    return 0


def _scan(options: argparse.Namespace) -> int:
    import json

    from mm.dicom.listing import scan_json, scan_table
    from mm.dicom.scan import scan

    found = scan(options.directory)
    print(json.dumps(scan_json(found), indent=1) if options.json else scan_table(found))
    return 0 if found.studies else 2


def _deidentify(options: argparse.Namespace) -> int:
    from mm.dicom.deidentify import deidentify
    from mm.dicom.errors import REASONS

    keep, pixels_ok = frozenset(options.keep), options.pixels == "ok"
    done = deidentify(options.directory, options.out, secret=options.secret, keep=keep, pixels_ok=pixels_ok)
    print(f"{done.num_written} written, {done.num_skipped} passed over (no DICOM)")
    if done.num_duplicates:
        print(f"{done.num_duplicates} passed over, the same as another file")
    for reason, count in sorted(done.refused.items()):
        print(f"{count} refused, {reason}: {REASONS[reason]}")
    if done.num_written == 0 and not done.refused:
        return 2
    return 1 if done.refused else 0


def _volume(options: argparse.Namespace) -> int:
    import json

    from mm.dicom.export import Outcome, export_volumes, outcome_json

    def show(outcome: Outcome) -> None:
        print(json.dumps(outcome_json(outcome)) if options.json else outcome.line(), flush=True)

    return export_volumes(options.directory, options.out, show)


def _inspect(options: argparse.Namespace) -> int:
    from mm.training.checkpoint import inspect

    print(inspect(options.checkpoint))
    if options.experts is not None:
        from mm.training.experts import draw, expert_visits

        draw(expert_visits(options.checkpoint), options.experts)
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from mm.data.readers import texts
    from mm.data.spec import load_spec
    from mm.data.tokenizer import train_tokenizer

    train_tokenizer(texts(load_spec(options.spec), studies=1500), vocab_size=options.vocab_size).save(options.out)
    return 0


def _import_tower(options: argparse.Namespace) -> int:
    from mm.encoders.convert import convert_tower

    number = convert_tower(options.source, options.name, options.out)
    print(f"{number} tensors written to {options.out}")
    return 0


def _data(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import track

    from mm.data.check import check
    from mm.data.check_text import check_table
    from mm.data.sample_page import sample_page
    from mm.data.spec import PhantomSpec, load_spec
    from mm.files import write_atomically

    spec = load_spec(options.spec, root=options.root)
    if options.html is not None and isinstance(spec, PhantomSpec):
        raise ValueError(f"--html shows rows of a table; {options.spec} is procedural: mm phantom makes its studies")
    if options.html is not None and not options.html.parent.is_dir():
        raise ValueError(f"--html: folder {str(options.html.parent)!r} does not exist")
    console = Console(stderr=True)
    found = check(
        spec,
        track=lambda names: track(
            names, description="files", console=console, transient=True, disable=not console.is_terminal
        ),
    )
    print(json.dumps(asdict(found), indent=1) if options.json else check_table(found))
    if options.html is not None:
        assert not isinstance(spec, PhantomSpec)
        write_atomically(options.html, sample_page(spec, found).encode())
        print(f"written to {options.html}", file=sys.stderr)
    return 1 if found.faulty else 0


def _import_decoder(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mm.exchange import import_decoder

    # On a terminal only: elsewhere nothing is drawn.
    with Console(stderr=True).status("reading") as status:
        told = import_decoder(
            options.path, options.out, num_experts=options.experts, dtype=options.dtype, step=status.update
        )
    print(told)
    return 0


def _export_decoder(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mm.exchange import export_decoder

    with Console(stderr=True).status("writing"):
        export_decoder(options.folder, options.out)
    print(f"written to {options.out}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from mm.phantom.write import write_studies
    from mm.pipeline.run import run_report

    studies, reports = options.out / "phantoms", options.out / "reports"
    print("Four phantom patients: procedural, no real person. Research software, not a medical device.")
    write_studies(studies, studies=4, seed=20, workers=2)
    code = run_report(studies / "studies", reports)
    for page in sorted(reports.glob("*/report.html")):
        print(page)
    return code


if __name__ == "__main__":
    main()
