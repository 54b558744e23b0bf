"""A run of `predict`: photos or clips and class names in, a folder of results out.

looked_at        what is asked, what lies at the output, and every photo decoded once
                 → the model is loaded: until then nothing is written
done_before      what an earlier run made in the same way, which is left as it is
segment_photos   the rest, one photo in the networks while another is written: `writers`, `overview`
or segment_clips the same of the frames of clips: `clips`
"""

import argparse
import collections
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.inference import clips, formats, overview, photos, requests, resuming, writers
from segdiff_jax.inference.passes import check_request
from segdiff_jax.inference.requests import plural
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import processes
from segdiff_jax.progress import Progress, reporter, working
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.weights import hub, workdir

_STDOUT = "-"
_ONE_FILE = ("labels", "scores", "coco")  # formats for stdout

Said = dict[str, Any]  # what O/<name>.json says of a photo or clip, or of its settings


def predict(args: argparse.Namespace) -> None:
    """Do what the command line of `predict` asks. All processes of a run call this."""
    with processes.together(), tempfile.TemporaryDirectory(prefix="segdiff_") as folder:
        paths, ours = photos.without_results(photos.find(args.images))
        _settle_format(args, photos.are_clips(paths))
        _check_streams(args, paths)
        processes.check_same("--images", paths)
        if ours:
            _say(args, f"left out: {plural(len(ours), 'result')} of an earlier run, as {ours[0]}")
        if not paths:
            raise UserError(f"--images {ours[0]}: only results of an earlier run: name the photos")
        first = processes.is_first()
        progress = functools.partial(reporter, enabled=first and not args.quiet)
        ask = _looked_at(args, paths, folder, progress("check"))
        with working(f"loading {args.checkpoint}", first):
            segmenter = Segmenter.load(ask.place, args.which)
            segmenter.table(ask.classes.classes)  # what is wrong with them stops before all else
        if args.output == _STDOUT:
            _write_to_stdout(ask, segmenter, progress("predict"))
            return
        own = _recorded(ask, segmenter)
        done = _done_before(ask, own)
        if ask.clips:
            _segment_clips(ask, segmenter, own, done, progress)
        else:
            _segment_photos(ask, segmenter, own, done, progress("predict"))
        _report(ask, len(done))


def _say(args: argparse.Namespace, text: str) -> None:
    """Print what is for people: on stdout, unless that is for programs."""
    if processes.is_first() and not args.quiet:
        for_programs = args.json_lines or args.output == _STDOUT
        print(text, file=sys.stderr if for_programs else sys.stdout, flush=True)


def _settle_format(args: argparse.Namespace, are_clips: bool) -> None:
    """Put into `args.format` what is to be written of each photo, or of each frame of a clip.

    Raise `UserError` for flags that would do nothing.
    """
    if args.frames and not are_clips:
        raise UserError("--frames: none of --images is a clip: leave it out")
    if are_clips and not args.frames and args.format:
        raise UserError(
            f"--format {' '.join(args.format)}: of a clip, formats are those of its frames: "
            "add --frames"
        )
    args.format = args.format or (["labels"] if args.frames or not are_clips else [])


def _check_streams(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Raise `UserError` for what cannot come from stdin or go to stdout."""
    if requests.STDIN in paths and processes.count() > 1:
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
    clips: dict[str, clips.Clip]  # path → what it is; {} of photos
    had: dict[str, Said]  # path → description of an earlier run
    unreadable: dict[str, str]  # path → why, of those that are left out

    def outputs(self) -> list[str]:
        """Return all files that may be written."""
        kinds, count = self.args.format, len(self.classes)
        if self.clips:
            return clips.outputs(self.clips.values(), kinds, count)
        return [*writers.outputs(self.names.values(), kinds, count), overview.PAGE]


def _looked_at(args: argparse.Namespace, paths: list[str], folder: str, step: Progress) -> _Ask:
    """Look at the photos and at what an earlier run made of them, before anything is written."""
    classes = requests.parse_classes(args.classes)
    place = hub.local(args.checkpoint)
    config = workdir.read_config(place)
    settings, names = _settings_of(args, config, classes), writers.names(paths)
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
            ask.clips[path] = clips.Clip(path, names[path], *clips.look(path, read))
            return 0
        return 0 if resuming.is_same(had.get(path), path, read) else read.check(path).guessed_max

    ask.unreadable.update(photos.checked(look, paths, args.skip_unreadable, step))
    for path in ask.unreadable:
        del names[path]
    if writes and of_clips:
        writers.check_output(args.output, names, ask.outputs())
    return ask


def _settings_of(args: argparse.Namespace, config: Config, classes: Vocabulary) -> dict[str, Any]:
    """Return the settings of a call to the segmenter. Raise `UserError` for impossible ones."""
    given = requests.Settings(
        steps=args.steps,
        ensemble=args.ensemble,
        shortlist=args.shortlist,
        tiles=args.tiles,
        threshold=args.threshold,
        closed=args.closed or None,
    )
    sampler, decoding = requests.chosen(config, given)
    check_request(sampler, config, len(classes))
    names = ("steps", "ensemble", "shortlist", "tiles")
    chosen = {name: getattr(sampler, name) for name in names}
    decided = {"threshold": decoding.threshold, "closed": decoding.closed}
    return chosen | {"seed": args.seed} | decided


def _write_to_stdout(ask: _Ask, segmenter: Segmenter, step: Progress) -> None:
    (found,) = _stream(ask, segmenter, list(ask.names), step)
    if processes.is_first():
        (file,) = formats.FORMATS[ask.args.format[0]]
        sys.stdout.buffer.write(file.encode(found, 0, "") or b"")
        sys.stdout.buffer.flush()


def _recorded(ask: _Ask, segmenter: Segmenter) -> dict[str, dict[str, Any]]:
    """Return the settings that the description of each photo or clip has: all that shape it."""
    used = writers.all_settings(ask.settings, segmenter.config) | {
        "checkpoint": ask.args.checkpoint,
        "checkpoint_step": segmenter.checkpoint_step,
        "weights": segmenter.networks.checksum(),
    }
    return {path: {**used, resuming.DIGEST: ask.read.digest(path)} for path in ask.names}


def _done_before(ask: _Ask, own: Mapping[str, Said]) -> dict[str, Said]:
    """Return the descriptions of an earlier run that are as asked; say what is not."""
    paths = list(ask.names)
    changes = {
        path: resuming.changes(ask.had[path], own[path], ask.classes, ask.args.format)
        for path in paths
        if path in ask.had
    }
    # The first process, which writes, decides: others need not see its folder.
    same = processes.stacked(np.array([changes.get(path) == [] for path in paths]))[0]
    again = collections.Counter(change for found in changes.values() for change in found)
    if again:
        listed = "; ".join(text for text, _ in again.most_common(3))
        count = sum(map(bool, changes.values()))
        verb = "is" if count == 1 else "are"
        _say(ask.args, f"{plural(count, 'earlier result')} {verb} made again: {listed}")
    return {p: ask.had.get(p, {}) for p, is_same in zip(paths, same, strict=True) if is_same}


def _segment_photos(
    ask: _Ask,
    segmenter: Segmenter,
    own: Mapping[str, Said],
    done: Mapping[str, Said],
    step: Progress,
) -> None:
    """Write the files of each photo that is not done, and index.html over all."""
    output, kinds, rows = ask.args.output, ask.args.format, []
    results = _stream(ask, segmenter, [path for path in ask.names if path not in done], step)
    if not processes.is_first():
        collections.deque(results, maxlen=0)  # its share of the networks' work
        return
    with writers.claimed(output, ask.outputs()):
        for path, name in ask.names.items():
            found = None if path in done else next(results)
            with processes.at_work("writes its results"):
                if found is None:
                    said, photo = done[path], ask.read.read(path).pixels
                else:
                    said = writers.write(output, name, path, found, own[path], kinds)
                    photo = found.photo
                rows.append(overview.row(output, path, photo, said))
                _json_line(ask, path, path in done)
        with processes.at_work("writes its results"):
            writers.write_summaries(output, list(ask.names.values()), ask.classes, kinds)
        note = overview.note(ask.args.checkpoint, ask.settings)
        overview.write_page(output, rows, ask.classes, note, ask.unreadable)


def _stream(
    ask: _Ask, segmenter: Segmenter, paths: Sequence[str], step: Progress
) -> Iterator[Segmentation]:
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
    segmenter: Segmenter,
    own: Mapping[str, Said],
    done: Mapping[str, Said],
    progress: Callable[[str, str], Progress],
) -> None:
    """Write the files of each clip that is not done, and those of the set of all frames."""
    output, kinds = ask.args.output, ask.args.format
    results = {
        path: _frames(ask, segmenter, clip, progress(path, "frame"))
        for path, clip in ask.clips.items()
        if path not in done
    }
    if not processes.is_first():
        for of_clip in results.values():
            collections.deque(of_clip, maxlen=0)  # its share of the networks' work
        return
    with writers.claimed(output, ask.outputs()):
        for path, clip in ask.clips.items():
            if path in results:
                clips.write(output, clip, results[path], kinds, own[path])
            _json_line(ask, path, path in done)
        names = clips.names_of_frames(ask.clips.values(), kinds)
        writers.write_summaries(output, names, ask.classes, kinds)


def _frames(
    ask: _Ask, segmenter: Segmenter, clip: clips.Clip, step: Progress
) -> Iterator[Segmentation]:
    frames = clips.frames(clip.path, ask.read)
    for number, found in enumerate(segmenter.stream(frames, ask.classes, **ask.settings), 1):
        yield found
        step(number, clip.frames)


def _json_line(ask: _Ask, path: str, skipped: bool) -> None:
    """Print what O/<name>.json says on one line, where --json-lines asks for it."""
    if ask.args.json_lines:
        written = epath.Path(ask.args.output, f"{ask.names[path]}.json").read_bytes()
        said = {"output": ask.args.output, "skipped": skipped} | json.loads(written)
        print(json.dumps(said, ensure_ascii=False), flush=True)


def _report(ask: _Ask, skipped: int) -> None:
    if ask.args.json_lines and processes.is_first():
        for path, why in ask.unreadable.items():
            print(json.dumps({"image": path, "error": why}, ensure_ascii=False), flush=True)
    segmented = plural(len(ask.names) - skipped, "clip" if ask.clips else "image")
    parts = [f"{segmented} segmented"]
    if skipped:
        parts.append(f"{skipped} skipped, done before with the same settings")
    if ask.unreadable:
        parts.append(f"{len(ask.unreadable)} unreadable left out")
    page = "" if ask.clips else overview.PAGE
    _say(ask.args, f"{', '.join(parts)}: {os.path.join(ask.args.output, page)}")
