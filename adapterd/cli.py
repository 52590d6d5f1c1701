"""The commands: arguments and calls, nothing else. Heavy imports wait until a command needs them."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

import adapterd
from adapterd.config import (
    AdaptersSettings,
    Bytes,
    CheckSettings,
    EstimateSettings,
    EvalSettings,
    ProveSettings,
    PullSettings,
    S,
    ServeSettings,
    Settings,
    TrainSettings,
    flag,
    load_settings,
    takes_many,
)
from adapterd.errors import AdapterdError, ConfigError
from adapterd.first_process import obey_sigterm
from adapterd.lora_modules import LoraModule
from adapterd.training.errors import TrainingInterrupted

logger = logging.getLogger(__name__)

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_GATE = 3  # a --fail-under limit was missed
EXIT_STOPPED = 75
"""sysexits.h's EX_TEMPFAIL: training was asked to stop and can go on."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    obey_sigterm()
    arguments = vars(build_parser().parse_args(argv))
    command: Callable[[dict[str, Any]], int] = arguments.pop("run")
    try:
        return command(arguments)
    except AdapterdError as error:
        for line in error.message.splitlines():
            print(f"adapterd: {line}", file=sys.stderr)
        if isinstance(error, TrainingInterrupted):
            return EXIT_STOPPED
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has read enough (`| head`); Python would complain once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def serve(flags: dict[str, Any]) -> int:
    settings = _settings(ServeSettings, flags)

    from adapterd.lora_modules import sort_out
    from adapterd.server.auth import check_exposure, trusts_this_machine, without_key
    from adapterd.server.keys import KeyRing, Role
    from adapterd.server.run import DrainingServer, bind, print_ready, url_of

    key_files: list[tuple[Path, Role]] = []
    if settings.api_key_file is not None:
        key_files.append((settings.api_key_file, "client"))
    if settings.admin_key_file is not None:
        key_files.append((settings.admin_key_file, "admin"))
    keys = KeyRing(key_files) if key_files else None
    check_exposure(
        settings.host,
        has_keys=keys is not None,
        has_admin_keys=keys is not None and keys.has("admin"),
        insecure_no_auth=settings.insecure_no_auth,
        allow_runtime_adapters=settings.allow_runtime_adapters,
    )
    modules = sort_out(settings.lora_modules)
    listener = bind(settings.host, settings.port)

    from adapterd.daemon import Daemon
    from adapterd.idle_proofs import IdleProofs, current_versions, prove_command
    from adapterd.server.app import create_app
    from adapterd.server.state import ServerState
    from adapterd.stages import Stages

    stages = Stages.of_this_process()
    stages.done("imports")
    daemon = Daemon.build(
        settings,
        state=settings.state,
        sources=settings,
        modules=modules,
        spellings=settings.router_spellings,
        stages=stages,
    )
    proofs: IdleProofs | None = None
    if settings.prove_idle is not None:
        proofs = IdleProofs(
            prove_command(settings.base, daemon.spec.dtype, settings.quantization),
            lambda: current_versions(daemon.registry.list()),
            daemon.engine.stats,
            idle_seconds=settings.prove_idle,
        )
    state = ServerState(
        daemon,
        max_queue=settings.max_queue,
        spellings=settings.listed_spellings,
        more_spellings=modules.spellings,
        warms_up=True,
        full_proofs=proofs,
    )
    keyless = without_key(keys, insecure_no_auth=settings.insecure_no_auth)
    app = create_app(
        state,
        allow_runtime_adapters=settings.allow_runtime_adapters,
        keys=keys,
        without_key=keyless,
        local_hosts_only=trusts_this_machine(settings.host, keys, insecure_no_auth=settings.insecure_no_auth),
    )

    def on_ready() -> None:
        stages.done("adapters and first forwards")
        logger.info("started in %s", stages)
        print_ready(url_of(listener), state.model_names(), asks_for_key=keyless is None)

    server = DrainingServer(
        app,
        state,
        drain_delay=settings.drain_delay,
        drain_timeout=settings.drain_timeout,
        on_ready=on_ready,
    )
    server.run(sockets=[listener])
    return server.exit_code


def train(flags: dict[str, Any]) -> int:
    settings = _settings(TrainSettings, flags)
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait for the checkpoint

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    from adapterd.training.train import train

    print(f"wrote {train(settings, stop=stop)}")
    return 0


def estimate(flags: dict[str, Any]) -> int:
    settings = _settings(EstimateSettings, flags)

    from adapterd.training.estimate import estimate

    found = estimate(settings)
    print(found.as_json() if settings.json_ else found.as_text())
    return 0


def evaluate(flags: dict[str, Any]) -> int:
    settings = _settings(EvalSettings, flags)

    from adapterd.evaluation.run import evaluate, write_files

    found = evaluate(settings)
    print(found.report, flush=True)  # before any file: what hours have found is not lost to a full disk
    write_files(found, settings)
    for line in found.missed:
        print(f"adapterd: {line}", file=sys.stderr)
    return EXIT_GATE if found.missed else 0


def pull(flags: dict[str, Any]) -> int:
    settings = _settings(PullSettings, flags)

    from adapterd.sources.pull import Pulled, Puller

    def report(pulled: Sequence[Pulled]) -> None:
        for one in pulled:
            if one.error is not None:
                print(f"adapterd: {one.error}", file=sys.stderr)
            if one.digest is not None:
                print(f"{one.name} {one.digest} {'new' if one.is_new else 'unchanged'}", flush=True)

    puller = Puller(settings)
    if settings.watch:
        # Wherever it is then: what is half done is removed on the way out.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        puller.watch(threading.Event(), report)
        return 0
    pulled = puller.pull()
    report(pulled)
    has_failed = any(one.error for one in pulled) and not settings.tolerate_errors
    return EXIT_ERROR if has_failed else 0


def check(flags: dict[str, Any]) -> int:
    settings = _settings(CheckSettings, flags)
    _leave_torch_out()

    from adapterd.training.check_run import run

    text, is_usable = run(settings, stream=sys.stdout, environ=os.environ)
    print(text, flush=True)
    return 0 if is_usable else EXIT_ERROR


def _leave_torch_out() -> None:
    """Tokenizers need no torch, and transformers does without where there is none: a third of the start-up time.

    None in `sys.modules` is Python's way to say so. Nothing happens where one of both is imported already.
    """
    if "torch" not in sys.modules and "transformers" not in sys.modules:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
        sys.modules["torch"] = None  # type: ignore[assignment]


def adapters(flags: dict[str, Any]) -> int:
    call, show = flags.pop("call"), flags.pop("show")
    given = {key: flags.pop(key) for key in (*AdaptersSettings.model_fields, "config") if key in flags}
    settings = _settings(AdaptersSettings, given)

    from adapterd.adapter_commands import run

    print(run(settings, call, show, flags))
    return 0


def prove(flags: dict[str, Any]) -> int:
    settings = _settings(ProveSettings, flags)

    from adapterd.full_proof import NotProven, prove_adapters

    proofs = prove_adapters(settings, settings.names)
    refused = [proof for proof in proofs if isinstance(proof, NotProven) or proof.verdict == "refused"]
    for proof in proofs:
        if isinstance(proof, NotProven):
            print(f"adapterd: {proof.error}", file=sys.stderr)
        else:
            print(proof)
    if settings.json_out is not None:
        settings.json_out.write_text(json.dumps([proof.as_dict() for proof in proofs], indent=2) + "\n")
    return EXIT_ERROR if refused else 0


def version(flags: dict[str, Any]) -> int:
    print(f"adapterd {adapterd.__version__}")
    return 0


def _settings(settings: type[S], flags: dict[str, Any]) -> S:
    loaded = load_settings(settings, flags, os.environ, flags.pop("config", None))
    _configure_logging(loaded.log_level)
    return loaded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adapterd", description="One frozen base language model, many LoRA adapters, one batch."
    )
    parser.add_argument("--version", action="version", version=f"adapterd {adapterd.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for settings, run, summary in (
        (ServeSettings, serve, "serve a base and its adapters under the OpenAI API"),
        (CheckSettings, check, "say what is wrong with rows before anybody trains on them"),
        (EstimateSettings, estimate, "say what a training would take, from a few seconds of it"),
        (TrainSettings, train, "train an adapter from rows of chat messages"),
        (
            EvalSettings,
            evaluate,
            "measure adapters against the base, bare and well prompted, on held-out rows",
        ),
        (PullSettings, pull, "fetch adapters into a directory that a daemon watches"),
    ):
        _add_command(commands, settings, run, summary)
    _add_adapters(commands)
    commands.add_parser("version", help="print the version").set_defaults(run=version)
    return parser


def _add_adapters(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`adapterd adapters ACTION`, whose flags every action takes as well."""
    from adapterd.adapter_commands import add_commands

    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", type=Path, metavar="FILE", help="settings as a TOML file")
    for field, info in AdaptersSettings.model_fields.items():
        if not info.exclude:  # a key on a command line would be seen by everyone on the machine
            _add_argument(common, field, info, is_positional=False)
    summary = "see and change the adapters of a running daemon"
    parser = commands.add_parser(
        "adapters", parents=[common], help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=adapters)
    _add_command(
        add_commands(parser, common), ProveSettings, prove, "compare adapters' whole answers with PEFT's own"
    )


def _add_command(
    commands: Any, settings: type[Settings], run: Callable[[dict[str, Any]], int], summary: str
) -> None:
    command = commands.add_parser(
        settings.command.split()[-1],
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="Every flag is also a variable (--max-queue: ADAPTERD_MAX_QUEUE) and a key of the --config"
        " file (max_queue). A flag wins over a variable, a variable over the file.",
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(run=run)
    if issubclass(settings, TrainSettings):
        recipe = "settings as a TOML file; its relative paths start where it lies"
        command.add_argument("config", nargs="?", default=None, type=Path, metavar="RECIPE", help=recipe)
    else:
        command.add_argument("--config", type=Path, metavar="FILE", help="settings as a TOML file")
    for field in sorted(settings.model_fields, key="log_level".__eq__):  # what all commands share comes last
        _add_argument(
            command, field, settings.model_fields[field], is_positional=field == settings.positional
        )


def _add_argument(
    parser: argparse.ArgumentParser, field: str, info: FieldInfo, *, is_positional: bool
) -> None:
    """Values stay text: the settings check them, wherever they come from."""
    if info.annotation is bool:
        parser.add_argument(flag(field), dest=field, action=argparse.BooleanOptionalAction, help=_help(info))
    elif is_positional:
        count = "*" if takes_many(info.annotation) else "?"
        parser.add_argument(field, nargs=count, metavar=_metavar(info), help=_help(info))
    elif takes_many(info.annotation):
        parser.add_argument(flag(field), nargs="+", action="extend", metavar=_metavar(info), help=_help(info))
    else:
        parser.add_argument(flag(field), metavar=_metavar(info), help=_help(info))


def _help(info: FieldInfo) -> str:
    text = str(info.description).replace("%", "%%")
    if info.is_required() or info.default in (None, (), False) or "default:" in text:
        return text
    default = ",".join(info.default) if isinstance(info.default, tuple) else info.default
    return f"{text} (default: {default})"


def _metavar(info: FieldInfo) -> str:
    kinds = {info.annotation, *get_args(info.annotation)}
    if Bytes in kinds:
        return "BYTES"
    if get_origin(info.annotation) is Literal:
        return "|".join(get_args(info.annotation))
    if own := [name for name in info.metadata if isinstance(name, str)]:
        return own[0]
    if takes_many(info.annotation):
        return "DIR" if Path in kinds else "NAME=PATH" if LoraModule in kinds else "NAME"
    for kind, metavar in ((Path, "PATH"), (int, "N"), (float, "X")):
        if kind in kinds:
            return metavar
    return "TEXT"


class _OneLine(logging.Formatter):
    """What a client or a file says may appear in a log line, but may not begin a new one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in record.message
        )
        return super().formatMessage(record)


def _configure_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("uvicorn", "httpx", "httpx2", "asyncio"):  # the OpenAI client brings httpx2
        logging.getLogger(noisy).setLevel(logging.WARNING)
