"""Segment photos: `python -m segdiff_jax.predict --checkpoint W --images a.jpg --output O …`."""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from segdiff_jax import cli, files
from segdiff_jax.errors import UserError
from segdiff_jax.inference import flags, photos, requests
from segdiff_jax.progress import Progress, reporter, working
from segdiff_jax.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from segdiff_jax.inference.clips import Length
    from segdiff_jax.inference.result import Segmentation
    from segdiff_jax.inference.segmenter import Segmenter

_STDOUT = "-"
_ONE_FILE = {"labels": "x.png", "scores": "x.npz", "coco": "x.json"}  # formats for stdout


def main(argv: list[str]) -> None:
    args = flags.parse(argv)
    with working("starting"):
        from segdiff_jax.parallel import processes, runtime

        runtime.start()
        processes.join()
        runtime.start_logging()
    with processes.together(), tempfile.TemporaryDirectory(prefix="segdiff_") as folder:
        paths, ours = photos.without_results(photos.find(args.images))
        _check_streams(args, paths)
        processes.check_same("--images", paths)
        say = functools.partial(_say, args)
        if ours:
            counted = f"{len(ours)} result" + ("s" if len(ours) > 1 else "")
            say(f"left out: {counted} of an earlier run, such as {ours[0]}")
        if not paths:
            raise UserError(f"--images {ours[0]}: only results of an earlier run: name the photos")
        _predict(args, paths, folder)


def _say(args: argparse.Namespace, text: str) -> None:
    """Print what is for people: on stdout, unless that is for programs."""
    from segdiff_jax.parallel import processes

    if processes.is_first() and not args.quiet:
        for_programs = args.json_lines or args.output == _STDOUT
        print(text, file=sys.stderr if for_programs else sys.stdout, flush=True)


def _check_streams(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Raise `UserError` for what cannot come from stdin or go to stdout."""
    from segdiff_jax.parallel import processes

    if photos.STDIN in paths and processes.count() > 1:
        raise UserError("--images -: only one process has stdin: write the photo to a file")
    if args.output != _STDOUT:
        return
    if len(paths) > 1 or len(args.format) > 1 or args.format[0] not in _ONE_FILE:
        raise UserError(
            f"--output -: for one image and one --format of {', '.join(_ONE_FILE)}: "
            "name a folder for more"
        )
    if args.json_lines or sys.stdout.isatty():
        why = "--json-lines writes there too" if args.json_lines else "it is a terminal"
        raise UserError(
            f"--output -: stdout is to take the file, but {why}: use one or redirect it"
        )


class _Ask(NamedTuple):
    """What is asked of which model for every photo, and where the results go."""

    args: argparse.Namespace
    segmenter: "Segmenter"
    read: photos.Photos
    classes: Vocabulary
    settings: dict[str, Any]  # of the call
    used: dict[str, Any]  # those, and the model's: what is recorded
    names: dict[str, str]  # path → name of its results
    first: bool  # of several processes, which all segment, this is the one that writes

    def recorded(self, path: str) -> dict[str, Any]:
        """Return `used` and the digest of the photo: what its description says of settings."""
        from segdiff_jax.inference import resuming

        return self.used | {resuming.DIGEST: self.read.digest(path)}

    def target(self, path: str) -> str:
        return os.path.join(self.args.output, self.names[path])


def _predict(args: argparse.Namespace, paths: list[str], folder: str) -> None:
    from segdiff_jax.parallel import processes

    first, to_folder = processes.is_first(), args.output != _STDOUT
    with working("loading libraries", first):
        from segdiff_jax.inference import clips, formats, resuming, writers
        from segdiff_jax.inference.segmenter import Segmenter
        from segdiff_jax.weights import hub, workdir

    classes = requests.parse_classes(args.classes)
    place = hub.local(args.checkpoint)
    config = workdir.read_config(place)
    settings = flags.settings_of(args, config, classes)
    names = writers.names(paths)
    read = photos.Photos(config.data, args.max_pixels, folder)
    progress = functools.partial(reporter, enabled=first and not args.quiet)
    of_clips = clips.only(paths)
    kinds = [] if of_clips and not args.frames else args.format
    if first and to_folder:
        formats.check(args.format, classes)
        written = writers.outputs(names.values(), kinds, len(classes))
        writers.check_output(args.output, names, written)
    _say(args, classes.summary())
    had = resuming.earlier(args.output, names) if to_folder else {}
    unreadable: dict[str, str] = {}
    if not of_clips:
        digests = {path: said["settings"][resuming.DIGEST] for path, said in had.items()}
        unreadable = photos.checked(read, paths, digests, args.skip_unreadable, progress("check"))
    paths = [path for path in paths if path not in unreadable]
    lengths = {path: clips.look(path) for path in paths} if of_clips else {}
    with working(f"loading {args.checkpoint}", first):
        segmenter = Segmenter.load(place, args.which)
        segmenter.table(classes.classes)  # what is wrong with the classes stops before all else
    used = writers.all_settings(settings, segmenter.config) | {
        "checkpoint": args.checkpoint,
        "checkpoint_step": segmenter.checkpoint_step,
        "weights": segmenter.networks.checksum(),
    }
    ask = _Ask(args, segmenter, read, classes, settings, used, names, first)
    if not to_folder:
        _write_to_stdout(ask, paths, progress("predict"))
        return
    done = _done_before(ask, paths, had, kinds)
    if of_clips:
        for path in paths:
            if path not in done:
                _segment_clip(ask, path, lengths[path], progress(path, "frame"))
    else:
        _segment_photos(ask, paths, done, unreadable, progress("predict"))
    _report(args, len(paths) - len(done), len(done), unreadable)


def _write_to_stdout(ask: _Ask, paths: Sequence[str], step: Progress) -> None:
    (found,) = _stream(ask, paths, step)
    if ask.first:
        sys.stdout.buffer.write(found.encoded(_ONE_FILE[ask.args.format[0]]))
        sys.stdout.buffer.flush()


def _done_before(
    ask: _Ask,
    paths: Sequence[str],
    had: Mapping[str, Mapping[str, Any]],
    kinds: Sequence[str],
) -> dict[str, Mapping[str, Any]]:
    """Return the descriptions `had` of an earlier run that are as asked; say what is not."""
    from segdiff_jax.inference import resuming
    from segdiff_jax.parallel import processes

    changes = {}
    for path in filter(had.__contains__, paths):
        changes[path] = resuming.changes(had[path], ask.recorded(path), ask.classes, kinds)
    # The first process, which writes, decides: others need not see its folder.
    same = processes.stacked(np.array([changes.get(path) == [] for path in paths]))[0]
    again = Counter(change for found in changes.values() for change in found)
    if again:
        listed = "; ".join(text for text, _ in again.most_common(3))
        count = sum(map(bool, changes.values()))
        _say(ask.args, f"{count} of an earlier run are done again, for other settings: {listed}")
    return {path: had.get(path, {}) for path, is_same in zip(paths, same, strict=True) if is_same}


def _segment_photos(
    ask: _Ask,
    paths: Sequence[str],
    done: Mapping[str, Mapping[str, Any]],
    unreadable: Mapping[str, str],
    step: Progress,
) -> None:
    """Write the files of each photo that is not done, and index.html over all."""
    from segdiff_jax.inference import resuming, writers
    from segdiff_jax.parallel import processes

    args, rows = ask.args, []
    results = _stream(ask, [p for p in paths if p not in done], step)
    with contextlib.ExitStack() as stack:
        if ask.first:
            names = [ask.names[path] for path in paths]
            written = writers.outputs(names, args.format, len(ask.classes))
            stack.enter_context(writers.claimed(args.output, written))
        for path in paths:
            found = None if path in done else next(results)
            if not ask.first:
                continue
            with processes.at_work("writes its results"):
                if found is None:
                    photo = ask.read.read(path).pixels
                    rows.append(resuming.row(args.output, path, photo, done[path], ask.classes))
                else:
                    own = ask.recorded(path)
                    rows.append(writers.write(ask.target(path), path, found, own, args.format))
                _json_line(args, ask.target(path), path in done)
        if ask.first:
            note = f"{args.checkpoint}: " + ", ".join(f"{k} {v}" for k, v in ask.settings.items())
            with processes.at_work("writes its results"):
                writers.write_summaries(args.output, names, ask.classes, args.format)
            writers.write_page(args.output, rows, ask.classes, note, unreadable)


def _stream(ask: _Ask, paths: Sequence[str], step: Progress) -> Iterator["Segmentation"]:
    """Yield the `Segmentation` of each photo. Raise `UserError` that names the photo."""
    if not paths:
        return
    finished, total = 0, len(paths)
    step(0, total)

    def part(done: float, jobs: int) -> None:
        # The stream is one photo ahead of its results: what is told is what the networks do.
        nonlocal finished
        if done and finished < total:
            step(round(finished + min(done / jobs, 0.99), 2), total)
        finished += done == jobs

    pixels = (ask.read.read(path).pixels for path in paths)
    results = ask.segmenter.stream(pixels, ask.classes, progress=part, **ask.settings)
    for path in paths:
        try:
            found = next(results)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if path == paths[-1]:
            step(total, total)
        yield found


def _segment_clip(ask: _Ask, path: str, length: "Length", step: Progress) -> None:
    """Write O/<name>_overlay.mp4 and O/<name>.json, and with --frames the files of each frame."""
    from segdiff_jax.inference import clips, writers

    args, name, own = ask.args, ask.names[path], ask.recorded(path)
    frames = [f"{name}_{n:06}" for n in range(1, length.frames + 1)] if args.frames else []
    written = [f"{name}_overlay.mp4", f"{name}.json"]
    written += writers.outputs(frames, args.format, len(ask.classes))[:-1]  # without a page
    summary = clips.Summary(ask.classes)
    with contextlib.ExitStack() as stack:
        if ask.first:
            stack.enter_context(writers.claimed(args.output, written))
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="segdiff_"))
        with clips.writer(Path(place, "clip.mp4"), length.rate) as append:
            results = ask.segmenter.stream(clips.frames(path), ask.classes, **ask.settings)
            for number, found in enumerate(results, 1):
                if ask.first:
                    append(clips.overlay(found))
                    summary.add(found)
                    if frames:
                        target = os.path.join(args.output, frames[number - 1])
                        writers.write(target, f"{path}#{number}", found, own, args.format)
                step(number, length.frames)
        if ask.first:
            data = Path(place, "clip.mp4").read_bytes()
            files.write_bytes(f"{ask.target(path)}_overlay.mp4", data)
            of_frames = {kind: [f"{frame}.json" for frame in frames] for kind in args.format}
            said = {
                "image": path,
                "frames_per_second": float(length.rate),
                **summary.figures(),
                "files": {"overlay": f"{name}_overlay.mp4", **(of_frames if frames else {})},
                "settings": own,
            }
            files.write_json(f"{ask.target(path)}.json", said)
            _json_line(args, ask.target(path), False)


def _json_line(args: argparse.Namespace, target: str, skipped: bool) -> None:
    """Print what O/<name>.json says on one line, where --json-lines asks for it."""
    if args.json_lines:
        said = {"output": args.output, "skipped": skipped}
        said |= json.loads(epath.Path(f"{target}.json").read_bytes())
        print(json.dumps(said, ensure_ascii=False), flush=True)


def _report(
    args: argparse.Namespace, segmented: int, skipped: int, unreadable: Mapping[str, str]
) -> None:
    from segdiff_jax.inference import writers
    from segdiff_jax.parallel import processes

    if args.json_lines and processes.is_first():
        for path, why in unreadable.items():
            print(json.dumps({"image": path, "error": why}, ensure_ascii=False), flush=True)
    parts = [f"{segmented} images segmented"]
    if skipped:
        parts.append(f"{skipped} skipped, done before with the same settings")
    if unreadable:
        parts.append(f"{len(unreadable)} unreadable left out")
    _say(args, f"{', '.join(parts)}: {os.path.join(args.output, writers.PAGE)}")


if __name__ == "__main__":
    cli.run(main)
