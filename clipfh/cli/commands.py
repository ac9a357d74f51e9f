"""The commands: each calls the library's function of its name, and prints what that gives.

What a function needs is loaded when it is called, so that `clipfh --help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import clipfh
from clipfh import UserError
from clipfh.cli import console
from clipfh.storage import layout


def prepare(args: argparse.Namespace) -> None:
    with console.progresses("images", "images compared") as (progress, compare_progress):
        catalogue = clipfh.prepare(
            args.source,
            args.out,
            val_fraction=args.val_fraction,
            image_size=args.image_size,
            max_bad=args.max_bad,
            seed=args.seed,
            follow_links=args.follow_links,
            skip_bad_lines=args.skip_bad_lines,
            encoding=args.encoding,
            inshop_boxes=args.inshop_boxes,
            without=args.without,
            progress=progress,
            compare_progress=compare_progress,
        )
    rows = [[split, count["images"], count["items"]] for split, count in catalogue.manifest["counts"].items()]
    print(console.table(["split", "images", "items"], rows))
    left_out = catalogue.manifest["left_out"]
    reasons = "".join(f"\n  {count:,}: {why}" for why, count in left_out["reasons"].items())
    print(f"{left_out['count']:,} photos left out{reasons}")
    for note in catalogue.manifest["notes"]:
        print(f"note: {note}")
    print(f"catalogue {args.out}")


def audit(args: argparse.Namespace) -> None:
    from clipfh.data.audit import describe_copies

    with console.progresses("images embedded", "images compared") as (progress, compare_progress):
        result = clipfh.audit(
            args.catalogue,
            checkpoint=args.checkpoint,
            settings=args.settings,
            address=args.address,
            dashboard=args.dashboard,
            progress=progress,
            compare_progress=compare_progress,
        )
    print("\n".join(describe_copies(result.copies)[:-1]) or "no picture is there twice")
    if result.suspects is None:
        print("labels were not looked at: --checkpoint names a model that can tell items apart")
    else:
        rows = [[each.path, each.item_id, each.like, f"{each.ratio:.1f}"] for each in result.suspects[:20]]
        print(f"{len(result.suspects):,} views look like another item's" + ", the first 20:" * (len(rows) == 20))
        if rows:
            print(console.table(["path", "item", "looks like", "times as near"], rows))
    print(f"page {result.page}")
    if result.without:
        file = result.page.parent / layout.WITHOUT
        print(f"{len(result.without):,} photos to leave out by prepare --without: {file}")


def prompts(args: argparse.Namespace) -> None:
    from clipfh.data.prompts import save_prompts
    from clipfh.data.text_report import format_findings, save_findings
    from clipfh.model.prompts import read_texts

    texts = read_texts(args.catalogue, args.model)
    findings = texts.report()
    print(format_findings(findings))
    if args.report:
        save_findings(args.report, findings)
    if args.out:
        prompt_of = texts.prompts(args.strategy)
        save_prompts(args.out, prompt_of)
        print(f"{len(prompt_of):,} prompts: {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    from clipfh.retrieval.evaluate import TOP

    with console.progress("images embedded") as progress:
        evaluation = clipfh.evaluate(
            args.catalogue,
            args.out,
            checkpoint=args.checkpoint,
            split=args.split,
            random_splits=args.random_splits,
            rerank=args.rerank,
            skip_unmatched=args.skip_unmatched,
            beside=args.beside,
            settings=args.settings,
            address=args.address,
            dashboard=args.dashboard,
            progress=progress,
        )
    if evaluation.is_reused:
        print(f"embeddings of the same model, images and prompts are in {args.out}: used again")
    print(console.format_metrics(evaluation.metrics))
    if evaluation.metrics["beside"]:
        print(console.format_beside(evaluation.metrics["beside"]))
    for note in evaluation.notes:
        print(f"note: {note}")
    metrics, predictions = f"{args.out}/{layout.METRICS}", f"{args.out}/{layout.PREDICTIONS}"
    print(f"all figures: {metrics}; the first {TOP} images of each ranking: {predictions}")


def train(args: argparse.Namespace) -> None:
    run = clipfh.train(
        args.stage,
        args.catalogue,
        args.out,
        preset=args.preset,
        warm_start=args.warm_start,
        resume=args.resume,
        track=args.track,
        **args.placement,
        settings=args.settings,
        address=args.address,
        dashboard=args.dashboard,
        log=console.print_now,
    )
    print(f"best val mAP {run.best_val_mAP:.4f}: clipfh export {args.out} --out FOLDER makes a model of it")


def sweep(args: argparse.Namespace) -> None:
    common = {name: vars(args)[name] for name in ("trials", "settings", "address", "dashboard")}
    if args.dry_run:
        from clipfh.sweep.run import estimate_sweep

        estimate_sweep(args.file, args.catalogue, **common, log=console.print_now)
        return
    with console.live(args.out) as (log, each_report):
        result = clipfh.sweep(
            args.file,
            args.catalogue,
            args.out,
            resume=args.resume,
            retry_failed=args.retry_failed,
            track=args.track,
            **common,
            log=log,
            each_report=each_report,
        )
    print(result)


def status(args: argparse.Namespace) -> None:
    from clipfh.report import status

    print(status.describe(args.path))


def export(args: argparse.Namespace) -> None:
    model = clipfh.export(args.path, args.out, onnx=args.onnx)
    photos = (
        f"{model.num_photos} photos of {model.catalogue}" if model.catalogue else "noise, as its catalogue is not there"
    )
    print(f"checked with {photos}: embeddings equal the checkpoint's")
    if args.onnx:
        print(f"ONNX towers: {args.out}/{layout.ONNX}")
    print(f'open_clip.create_model_and_transforms("local-dir:{args.out}") loads it; {args.out}/README.md tells more')


def embed(args: argparse.Namespace) -> None:
    with console.progress("images embedded") as progress:
        index = clipfh.embed(
            args.catalogue,
            args.out,
            checkpoint=args.checkpoint,
            settings=args.settings,
            address=args.address,
            dashboard=args.dashboard,
            progress=progress,
        )
    count, size = index.embedding.shape
    print(f"{count:,} embeddings of {size} numbers: {args.out}")
    print(f"clipfh search --embeddings {args.out} --image PHOTO finds the nearest; --text WORDS looks for words")


def search(args: argparse.Namespace) -> None:
    images = clipfh.search(
        args.embeddings,
        image=args.image,
        text=args.text,
        top=args.top,
        html=args.html,
        checkpoint=args.checkpoint,
    )
    rows = [[str(i), f"{each.similarity:.4f}", each.item_id, each.path] for i, each in enumerate(images, 1)]
    print(console.table(["", "similarity", "item", "path"], rows))
    if args.html:
        print(f"page {args.html}")


def report(args: argparse.Namespace) -> None:
    from clipfh.report import page

    print(f"report {page.write(args.paths, args.out)}")


def demo(args: argparse.Namespace) -> None:
    from clipfh.demo import demo
    from clipfh.storage.store import Folder

    demo.run(Folder(args.out).local_path(), console.print_now)


def submit(args: argparse.Namespace) -> int:
    folder = Path(args.working_dir)
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: no such folder")
    check_submission(args.inner, folder)
    from clipfh.cluster import jobs

    return jobs.run(args.address, folder, args.words)


def check_submission(inner: argparse.Namespace | None, folder: Path) -> None:
    """Check here what would make the command fail on the cluster.

    Raises:
        UserError: no command, one for this machine, a sweep file that does not fit, or paths that mean nothing there.
    """
    if inner is None:
        raise UserError("clipfh submit needs a command: clipfh submit --address URL -- sweep FILE.yaml CATALOGUE ...")
    if inner.command in ("submit", "demo"):
        raise UserError(f"clipfh {inner.command} is for this machine, not for a job")
    for name in ("catalogue", "source", "path", "paths", "checkpoint", "warm_start", "out", "beside"):
        value = vars(inner).get(name) or []
        for path in [value] if isinstance(value, str) else value:
            if "://" not in path and not Path(path).is_absolute():
                raise UserError(
                    f"{path}: a job runs in a folder of its own, gone afterwards: "
                    "give a path from / on, which all nodes of the cluster see"
                )
    if inner.command == "sweep" and not Path(inner.file).is_absolute():
        from clipfh.config import sweep_file

        sweep_file.load(folder / inner.file, inner.settings, inner.trials)
