"""Segment photos: `python -m segdiff_jax.predict --checkpoint W --images a.jpg --output O …`."""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from segdiff_jax import cli
from segdiff_jax.errors import UserError
from segdiff_jax.inference import flags, photos, requests
from segdiff_jax.inference.requests import plural
from segdiff_jax.progress import Progress, reporter, working
from segdiff_jax.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from segdiff_jax.inference.clips import Clip
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
        flags.settle_format(args, photos.are_clips(paths))
        _check_streams(args, paths)
        processes.check_same("--images", paths)
        say = functools.partial(_say, args)
        if ours:
            say(f"left out: {plural(len(ours), 'result')} of an earlier run, such as {ours[0]}")
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
    if photos.are_clips(paths):
        raise UserError("--output -: the results of a clip are several files: name a folder")
    if len(paths) > 1 or len(args.format) > 1 or args.format[0] not in _ONE_FILE:
        raise UserError(
            f"--output -: stdout takes one image in one format ({', '.join(_ONE_FILE)}): "
            "name a folder for more"
        )
    if args.json_lines or sys.stdout.isatty():
        why = "--json-lines writes there too" if args.json_lines else "it is a terminal"
        raise UserError(
            f"--output -: stdout is to take the file, but {why}: use one or redirect it"
        )


class _Ask(NamedTuple):
    """What is asked for, and what was seen of it before the networks are loaded."""

    args: argparse.Namespace
    place: str  # of the checkpoint
    classes: Vocabulary
    settings: dict[str, Any]  # of the call
    read: photos.Photos
    names: dict[str, str]  # path → name of its results; only those that can be read
    clips: "dict[str, Clip]"  # path → its length and more; {} of photos
    had: dict[str, Any]  # path → description of an earlier run
    unreadable: dict[str, str]  # path → why, of those that are left out

    def target(self, path: str) -> str:
        return os.path.join(self.args.output, self.names[path])

    def recorded(self, path: str, used: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings `used` and the digest of the photo, as its description has them."""
        from segdiff_jax.inference import resuming

        return {**used, resuming.DIGEST: self.read.digest(path)}

    def outputs(self) -> list[str]:
        """Return all files that may be written."""
        from segdiff_jax.inference import clips, overview, writers

        kinds, count = self.args.format, len(self.classes)
        if self.clips:
            return clips.outputs(self.clips.values(), kinds, count)
        return [*writers.outputs(self.names.values(), kinds, count), overview.PAGE]


class _Model(NamedTuple):
    """The model that is loaded, and what is recorded of how it is asked."""

    segmenter: "Segmenter"
    used: dict[str, Any]  # all settings, of the call and the model's own


def _predict(args: argparse.Namespace, paths: list[str], folder: str) -> None:
    from segdiff_jax.parallel import processes

    first = processes.is_first()
    with working("loading libraries", first):
        from segdiff_jax.inference import writers
        from segdiff_jax.inference.segmenter import Segmenter

    progress = functools.partial(reporter, enabled=first and not args.quiet)
    ask = _looked_at(args, paths, folder, progress("check"))
    with working(f"loading {args.checkpoint}", first):
        segmenter = Segmenter.load(ask.place, args.which)
        segmenter.table(ask.classes.classes)  # what is wrong with the classes stops before all else
    used = writers.all_settings(ask.settings, segmenter.config) | {
        "checkpoint": args.checkpoint,
        "checkpoint_step": segmenter.checkpoint_step,
        "weights": segmenter.networks.checksum(),
    }
    model = _Model(segmenter, used)
    if args.output == _STDOUT:
        _write_to_stdout(ask, segmenter, progress("predict"))
        return
    done = _done_before(ask, used)
    if ask.clips:
        _segment_clips(ask, model, done, progress)
    else:
        _segment_photos(ask, model, done, progress("predict"))
    _report(ask, len(ask.names) - len(done), len(done))


def _looked_at(args: argparse.Namespace, paths: list[str], folder: str, step: Progress) -> _Ask:
    """Look at the photos and at what an earlier run made of them, before anything is written."""
    from segdiff_jax.inference import clips, formats, resuming, writers
    from segdiff_jax.parallel import processes
    from segdiff_jax.weights import hub, workdir

    classes = requests.parse_classes(args.classes)
    place = hub.local(args.checkpoint)
    config = workdir.read_config(place)
    settings, names = flags.settings_of(args, config, classes), writers.names(paths)
    read = photos.Photos(config.data, args.max_pixels, folder)
    to_folder, of_clips = args.output != _STDOUT, photos.are_clips(paths)
    had = resuming.earlier(args.output, names) if to_folder else {}
    ask = _Ask(args, place, classes, settings, read, names, {}, had, {})
    writes = to_folder and processes.is_first()
    if writes:
        formats.check(args.format, classes)
        writers.check_output(args.output, names, [] if of_clips else ask.outputs())
    _say(args, classes.summary())

    def look(path: str) -> int:
        if of_clips:
            ask.clips[path] = clips.Clip(path, names[path], clips.look(path, read))
            return 0
        return 0 if resuming.is_same(had.get(path), path, read) else read.check(path).guessed_max

    ask.unreadable.update(photos.checked(look, paths, args.skip_unreadable, step))
    for path in ask.unreadable:
        del names[path]
    if writes and of_clips:
        writers.check_output(args.output, names, ask.outputs())
    return ask


def _write_to_stdout(ask: _Ask, segmenter: "Segmenter", step: Progress) -> None:
    from segdiff_jax.parallel import processes

    (found,) = _stream(ask, segmenter, list(ask.names), step)
    if processes.is_first():
        sys.stdout.buffer.write(found.encoded(_ONE_FILE[ask.args.format[0]]))
        sys.stdout.buffer.flush()


def _done_before(ask: _Ask, used: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the descriptions of an earlier run that are as asked; say what is not."""
    from segdiff_jax.inference import resuming
    from segdiff_jax.parallel import processes

    paths, changes = list(ask.names), {}
    for path in filter(ask.had.__contains__, paths):
        now = ask.recorded(path, used)
        changes[path] = resuming.changes(ask.had[path], now, ask.classes, ask.args.format)
    # The first process, which writes, decides: others need not see its folder.
    same = processes.stacked(np.array([changes.get(path) == [] for path in paths]))[0]
    again = Counter(change for found in changes.values() for change in found)
    if again:
        listed = "; ".join(text for text, _ in again.most_common(3))
        count = sum(map(bool, changes.values()))
        verb = "is" if count == 1 else "are"
        _say(ask.args, f"{plural(count, 'earlier result')} {verb} made again: {listed}")
    return {p: ask.had.get(p, {}) for p, is_same in zip(paths, same, strict=True) if is_same}


def _segment_photos(
    ask: _Ask, model: _Model, done: Mapping[str, Mapping[str, Any]], step: Progress
) -> None:
    """Write the files of each photo that is not done, and index.html over all."""
    from segdiff_jax.inference import overview, writers
    from segdiff_jax.parallel import processes

    args, rows, first = ask.args, [], processes.is_first()
    results = _stream(ask, model.segmenter, [p for p in ask.names if p not in done], step)
    with writers.claimed(args.output, ask.outputs()) if first else contextlib.nullcontext():
        for path in ask.names:
            found = None if path in done else next(results)
            if not first:
                continue
            with processes.at_work("writes its results"):
                if found is None:
                    said, photo = done[path], ask.read.read(path).pixels
                else:
                    own, photo = ask.recorded(path, model.used), found.photo
                    said = writers.write(ask.target(path), path, found, own, args.format)
                rows.append(overview.row(args.output, path, photo, said))
                _json_line(ask, path, path in done)
        if first:
            names = list(ask.names.values())
            with processes.at_work("writes its results"):
                writers.write_summaries(args.output, names, ask.classes, args.format)
            note = overview.note(args.checkpoint, ask.settings)
            overview.write_page(args.output, rows, ask.classes, note, ask.unreadable)


def _stream(
    ask: _Ask, segmenter: "Segmenter", paths: Sequence[str], step: Progress
) -> Iterator["Segmentation"]:
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
    results = segmenter.stream(pixels, ask.classes, progress=part, **ask.settings)
    for path in paths:
        try:
            found = next(results)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if path == paths[-1]:
            step(total, total)
        yield found


def _segment_clips(
    ask: _Ask,
    model: _Model,
    done: Mapping[str, Mapping[str, Any]],
    progress: Callable[[str, str], Progress],
) -> None:
    """Write the files of each clip that is not done, and those of the set of all frames."""
    from segdiff_jax.inference import clips, writers
    from segdiff_jax.parallel import processes

    args, first = ask.args, processes.is_first()
    with writers.claimed(args.output, ask.outputs()) if first else contextlib.nullcontext():
        for path, clip in ask.clips.items():
            if path not in done:
                results = _frames(ask, model.segmenter, clip, progress(path, "frame"))
                if first:
                    own = ask.recorded(path, model.used)
                    clips.write(args.output, clip, results, args.format, own)
                for _ in results:
                    pass  # of the processes that do not write
            if first:
                _json_line(ask, path, path in done)
        if first:
            names = clips.names_of_frames(ask.clips.values(), args.format)
            writers.write_summaries(args.output, names, ask.classes, args.format)


def _frames(
    ask: _Ask, segmenter: "Segmenter", clip: "Clip", step: Progress
) -> Iterator["Segmentation"]:
    from segdiff_jax.inference import clips

    frames = clips.frames(clip.path, ask.read)
    for number, found in enumerate(segmenter.stream(frames, ask.classes, **ask.settings), 1):
        yield found
        step(number, clip.length.frames)


def _json_line(ask: _Ask, path: str, skipped: bool) -> None:
    """Print what O/<name>.json says on one line, where --json-lines asks for it."""
    if ask.args.json_lines:
        said = {"output": ask.args.output, "skipped": skipped}
        said |= json.loads(epath.Path(f"{ask.target(path)}.json").read_bytes())
        print(json.dumps(said, ensure_ascii=False), flush=True)


def _report(ask: _Ask, segmented: int, skipped: int) -> None:
    from segdiff_jax.inference import overview
    from segdiff_jax.parallel import processes

    if ask.args.json_lines and processes.is_first():
        for path, why in ask.unreadable.items():
            print(json.dumps({"image": path, "error": why}, ensure_ascii=False), flush=True)
    parts = [f"{plural(segmented, 'clip' if ask.clips else 'image')} segmented"]
    if skipped:
        parts.append(f"{skipped} skipped, done before with the same settings")
    if ask.unreadable:
        parts.append(f"{len(ask.unreadable)} unreadable left out")
    page = "" if ask.clips else overview.PAGE
    _say(ask.args, f"{', '.join(parts)}: {os.path.join(ask.args.output, page)}")


if __name__ == "__main__":
    cli.run(main)
