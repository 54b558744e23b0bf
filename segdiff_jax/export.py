"""Export a model: `python -m segdiff_jax.export --checkpoint W --output D --format diffusers`."""

import argparse
import contextlib
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from segdiff_jax import cli, files, ownership, waiting
from segdiff_jax.config import Config, SamplerConfig, stored
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary

if TYPE_CHECKING:
    from segdiff_jax.weights.loading import Networks
    from segdiff_jax.weights.mask_decoders import Decoders

_DESCRIPTION = (
    """Export a trained model. The output appears whole or not at all.

diffusers: a folder in Stable Diffusion's layout, for diffusers and transformers (docs/pytorch.md)
and for --checkpoint of predict, evaluate and export, with a model card and the config.
stablehlo: the sampler (image, prompt embeddings, key -> map, decoded by the VAE) as one file for
jax.export, weights included up to 2 GiB and beside it from there on, which runs on CPU, CUDA and
TPU without this package; sampler.json describes it.

"""
    + waiting.HELP
)


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    _check_arguments(args)
    if args.verify:
        from segdiff_jax.weights import verify

        verify.check_libraries()
    if args.push_to_hub:
        _check_hub(args.push_to_hub, args.output)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    from segdiff_jax.parallel import runtime
    from segdiff_jax.weights import hub, loading, workdir

    runtime.start()
    folder = hub.local(args.checkpoint)
    _check_output(args, folder, workdir.read_config(folder))
    networks, decoders, _ = loading.load_networks(folder, args.weights, args.which)
    trained = workdir.read_classes(folder)
    if args.format == "diffusers":
        networks = loading.with_nearest_decoder(networks, decoders, args.checkpoint)
        write_folder(networks, args.output, args.dtype, trained, decoders)
    else:
        from segdiff_jax.inference import stablehlo
        from segdiff_jax.inference.segmenter import Segmenter

        sampler = _sampler(args, networks[-1])
        model = Segmenter(*networks, trained=trained)
        stablehlo.write(model, args.output, sampler, args.dtype)
        if sampler.decoder != "vae":
            print(f"in place of sampler.decoder={sampler.decoder}, it decodes by the VAE")
    print(f"exported: {args.output}")
    if args.verify:
        found = verify.differences(args.output, networks[-1].data.image_size)
        worst = max(found, key=lambda name: found[name])
        print(f"verified: largest difference to diffusers {found[worst]:.1e} ({worst})")
        if not found[worst] <= verify.TOLERANCE:  # NaN too
            print(f"this is more than {verify.TOLERANCE:g}", file=sys.stderr)
            sys.exit(1)
    if args.push_to_hub:
        print(f"pushed: {_push(args.push_to_hub, args.output)}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.export", _DESCRIPTION)
    add = parser.add_argument
    cli.add_checkpoint(parser)
    add(
        "--output",
        required=True,
        metavar="DIR",
        type=cli.path,
        help="the folder to make, local or gs://; an export that this command wrote there is "
        "replaced, any other file left alone",
    )
    add("--format", required=True, choices=("diffusers", "stablehlo"), help="see above")
    add(
        "--weights",
        choices=("ema", "raw"),
        help="the moving average or the last weights; default: ema where the training kept one",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the stored weights; default: float32",
    )
    add(
        "--steps",
        type=cli.positive_int,
        metavar="T",
        help="stablehlo: denoising steps; default: as the checkpoint's config says",
    )
    add(
        "--ensemble",
        type=cli.positive_int,
        metavar="N",
        help="stablehlo: samples to merge; default likewise",
    )
    add(
        "--verify",
        action="store_true",
        help="diffusers: load the folder in diffusers too and compare the networks on random "
        "input; exit code 1 if they differ (needs torch and diffusers)",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="also upload the folder to this Hugging Face repository, OWNER/NAME, in one commit; "
        "made private if it does not exist",
    )
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ("steps", "ensemble"):
        if getattr(args, name) and args.format == "diffusers":
            raise UserError(f"--{name}: only --format stablehlo fixes the sampler: leave it out")
    if args.verify and (args.format != "diffusers" or files.is_remote(args.output)):
        raise UserError("--verify: only for a local folder of --format diffusers: leave it out")


def _check_output(args: argparse.Namespace, folder: str, config: Config) -> None:
    """Raise `UserError`, before minutes of work, if the output would replace what is not its own.

    Never replaced: what the export is made from, whoever wrote it.
    """
    ownership.check_apart(args.output, "--checkpoint", folder)
    if config.init_from:
        ownership.check_apart(args.output, "the run's init_from", config.init_from)
    ownership.check_whole(args.output, args.format)


def _sampler(args: argparse.Namespace, config: Config) -> SamplerConfig:
    from segdiff_jax.inference.passes import check_sampling

    steps, ensemble = args.steps or config.sampler.steps, args.ensemble or config.sampler.ensemble
    sampler = dataclasses.replace(config.sampler, steps=steps, ensemble=ensemble)
    check_sampling(sampler, config)
    return sampler


def write_folder(
    networks: "Networks",
    directory: os.PathLike[str] | str,
    dtype: str = "float32",
    trained: vocabulary.Vocabulary | None = None,
    decoders: "Decoders | None" = None,
) -> None:
    """Write networks, config and decoders of `loading.load_networks` as a Stable Diffusion folder.

    The bytes depend on the arguments only, and loading the folder gives the arguments back (but
    for `portable`). trained: the classes of the training. Raise `UserError` as
    `weights.pretrained.save` does.
    """
    from flax import nnx

    from segdiff_jax.weights import mask_decoders, pretrained, workdir
    from segdiff_jax.weights.model_card import model_card

    unet, vae, text_encoder, tokenizer, config = networks
    config = portable(config)
    settings = files.to_json(stored(config))
    card = model_card(config, unet.config.in_channels)
    decoders = decoders or mask_decoders.Decoders()
    frozen = vae, text_encoder, tokenizer
    parts = pretrained.Pretrained(unet, *frozen, config.diffusion, decoders.tiny)
    extra: dict[str, str | bytes] = {"README.md": card, workdir.EXPORT_SETTINGS: settings}
    if decoders.linear is not None:
        extra[mask_decoders.LINEAR] = mask_decoders.linear_to_bytes(decoders.linear)
    if decoders.joint is not None:
        extra[mask_decoders.JOINT] = mask_decoders.joint_to_bytes(nnx.state(decoders.joint), dtype)
    if trained is not None:
        # Not its name, which is a path of the machine that trained.
        own = dataclasses.replace(trained, name=workdir.CLASSES)
        extra[workdir.CLASSES] = vocabulary.to_json(own)
    pretrained.save(parts, directory, dtype=dtype, extra_files=extra, kind="diffusers")


def portable(config: Config) -> Config:
    """Return `config` without the paths of the machine that trained: nobody else has them."""
    data, start = config.data, config.init_from
    own = data.vocabulary not in vocabulary.packaged()
    data = dataclasses.replace(data, root="", vocabulary="" if own else data.vocabulary)
    # A repository stays: it says whose licence the weights carry. "runs/x" only looks like one.
    repository = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", start)
    keep = repository and not epath.Path(start).exists()
    return dataclasses.replace(
        config, data=data, init_from=start if keep else "", init_tokenizer=""
    )


def _check_hub(repository: str, output: str) -> None:
    """Raise `UserError` before the work if the upload after it cannot succeed."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # a submodule that nothing else imports

    if files.is_remote(output):
        raise UserError(f"--output {output}: only a local folder can be pushed: push from there")
    with _pushing(repository):
        validate_repo_id(repository)
        _asked(HfApi().whoami)


def _push(repository: str, folder: str) -> str:
    """Upload a folder in one commit. Return the repository's address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, root = HfApi(), Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    paths = [path for path in paths if path.name != ownership.MARKER]  # it is about this disk
    with _pushing(repository):
        url = _asked(lambda: api.create_repo(repository, private=True, exist_ok=True))
        # Not upload_folder: its uploads in batches make a commit of each.
        operations = [CommitOperationAdd(path.relative_to(root).as_posix(), path) for path in paths]
        commit = lambda: api.create_commit(  # noqa: E731
            repository, operations, commit_message="Export from segdiff_jax"
        )
        # How far it is cannot be seen, so it has no end but that of the library's own patience.
        waiting.bounded(commit, waiting.Wait(f"Hugging Face to take {repository}", None))
    return str(url)


def _asked(request: Callable[[], Any]) -> Any:
    """Return the answer to a short request to Hugging Face."""
    wait = waiting.Wait("Hugging Face", waiting.NETWORK, "check the network")
    return waiting.bounded(request, wait)


@contextlib.contextmanager
def _pushing(repository: str) -> Iterator[None]:
    """Turn what Hugging Face refuses, or its library cannot do, into a `UserError`."""
    try:
        yield
    except waiting.NoAnswer:
        raise
    except Exception as error:  # the library raises its own, httpx's, OSError and ValueError
        reason = " ".join(str(error).split())[:200] or repr(error)
        raise UserError(
            f"--push-to-hub {repository}: {reason}: check the name, the network and `hf auth login`"
        ) from error


if __name__ == "__main__":
    cli.run(main)
