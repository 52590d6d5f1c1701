"""`adapterd adapters ...`: a running daemon's adapters from a terminal. Every command is one call of /v1/adapters.

What is printed is for people, or, with --json, the daemon's own answer. No torch.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:  # its imports are heavy, and most commands need none of them
    from adapterd.daemon_client import ClientSettings, DaemonClient

Json = dict[str, Any]

UNLOAD_MARGIN_SECONDS = 60.0
"""An unload answers at its deadline at the latest, plus what an abort takes."""


def add_commands(
    parser: argparse.ArgumentParser, common: argparse.ArgumentParser
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """The commands below `adapterd adapters`; `common` has the flags that all of them take. Others may be added."""
    commands = parser.add_subparsers(metavar="ACTION", required=True)

    def add(action: str, call: Callable[..., Json], show: Callable[[Json], str], summary: str) -> Any:
        command = commands.add_parser(
            action, parents=[common], help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        command.set_defaults(call=call, show=show)
        return command

    def add_named(
        action: str, call: Callable[..., Json], summary: str, show: Callable[[Json], str] = _line
    ) -> Any:
        command = add(action, call, show, summary)
        command.add_argument("name", metavar="NAME")
        return command

    add("ls", lambda client: client.call("GET", ""), _table, "list every adapter")
    add_named(
        "show", lambda client, name: client.call("GET", _path(name)), "say all about one adapter", _whole
    )

    load = add_named("load", _load, "load an adapter from a source, and serve it")
    load.add_argument(
        "source", metavar="SOURCE", help="a directory, hf://OWNER/NAME@REVISION, s3://, gs://, https://"
    )
    load.add_argument("--sha256", metavar="HEX", help="hash that adapter_model.safetensors must have")
    load.add_argument("--replace", action="store_true", help="also if the name serves other content now")
    load.add_argument("--pin", action="store_true", help="keep it in memory")

    update = add_named("update", _update, "read an adapter's source again, or from now on another one")
    update.add_argument(
        "source", nargs="?", metavar="SOURCE", help="the new source (default: the one it has)"
    )
    update.add_argument("--sha256", metavar="HEX", help="hash that adapter_model.safetensors must have")

    for action, call, summary in (
        ("unload", _unload, "serve an adapter no more, and wait until its memory is back"),
        ("delete", _delete, "unload an adapter, and forget its versions and aliases"),
    ):
        unload = add_named(action, call, summary, _unloaded)
        unload.add_argument(
            "--deadline",
            type=float,
            default=30.0,
            metavar="SECONDS",
            help="how long running requests may hold it (30)",
        )
        unload.add_argument("--abort", action="store_true", help="end those that still run at the deadline")

    for action, summary in (
        ("pin", "keep an adapter in memory"),
        ("unpin", "let an adapter leave memory like any other"),
        ("prefetch", "have an adapter in memory before it is asked for"),
    ):
        add_named(action, _action(action), summary)

    alias = add_named("alias", _alias, "let NAME@ALIAS mean a version")
    alias.add_argument("alias", metavar="ALIAS")
    alias.add_argument(
        "version", nargs="?", metavar="VERSION", help="number, digest or alias (default: current)"
    )
    unalias = add_named("unalias", _unalias, "remove an alias")
    unalias.add_argument("alias", metavar="ALIAS")
    rollback = add_named("rollback", _rollback, "go back to the version before, or to a named one")
    rollback.add_argument(
        "version", nargs="?", metavar="VERSION", help="number, digest or alias (default: the last)"
    )
    return commands


def run(
    settings: "ClientSettings",
    call: Callable[..., Json],
    show: Callable[[Json], str],
    arguments: Mapping[str, object],
) -> str:
    """Make one call, and say what came of it."""
    from adapterd.daemon_client import DaemonClient

    client = DaemonClient(settings)
    try:
        answer = call(client, **arguments)
    finally:
        client.close()
    return json.dumps(answer, indent=2) if settings.json_ else show(answer)


# The calls


def _path(name: str, action: str = "") -> str:
    return f"/{quote(name, safe='')}{action}"


def _load(
    client: "DaemonClient", name: str, source: str, sha256: str | None, replace: bool, pin: bool
) -> Json:
    body = {"name": name, "source": source, "sha256": sha256, "replace": replace, "pinned": pin}
    return client.call("POST", "", body)


def _update(client: "DaemonClient", name: str, source: str | None, sha256: str | None) -> Json:
    return client.call("POST", _path(name, "/update"), {"source": source, "sha256": sha256})


def _unload(client: "DaemonClient", name: str, deadline: float, abort: bool) -> Json:
    body = {"deadline_seconds": deadline, "abort": abort}
    return client.call("POST", _path(name, "/unload"), body, seconds=deadline + UNLOAD_MARGIN_SECONDS)


def _delete(client: "DaemonClient", name: str, deadline: float, abort: bool) -> Json:
    query = f"?deadline_seconds={deadline}&abort={str(abort).lower()}"
    return client.call("DELETE", _path(name) + query, seconds=deadline + UNLOAD_MARGIN_SECONDS)


def _action(action: str) -> Callable[..., Json]:
    return lambda client, name: client.call("POST", _path(name, f"/{action}"), {})


def _alias(client: "DaemonClient", name: str, alias: str, version: str | None) -> Json:
    return client.call("POST", _path(name, "/alias"), {"alias": alias, "version": version})


def _unalias(client: "DaemonClient", name: str, alias: str) -> Json:
    return client.call("DELETE", _path(name, f"/aliases/{quote(alias, safe='')}"))


def _rollback(client: "DaemonClient", name: str, version: str | None) -> Json:
    return client.call("POST", _path(name, "/rollback"), {"version": version})


# What people see


def _table(answer: Json) -> str:
    rows = [
        (
            card["name"],
            _or_dash(card["version"]),
            card["state"].lower() + (" (!)" if card["error"] and card["state"] == "READY" else ""),
            _or_dash(card["tier"]) + (" pinned" if card["pinned"] else ""),
            _or_dash(card["rank"] or None),
            _size(card["bytes"]),
            str(card["requests_served"]),
            _ago(card["last_used"]),
            (card["digest"] or "-")[:12],
            card["owner"] or "-",
            card["source"],
        )
        for card in answer["data"]
    ]
    head = (
        "NAME",
        "VERSION",
        "STATE",
        "TIER",
        "RANK",
        "SIZE",
        "SERVED",
        "LAST USED",
        "DIGEST",
        "OWNER",
        "SOURCE",
    )
    lines = [_aligned([head, *rows])] if rows else ["no adapter is registered"]
    manifest = answer["manifest"]
    if manifest is not None and manifest["error"]:
        lines.append(f"the manifest is not the one in force: {manifest['error']}")
    return "\n".join(lines)


def _whole(card: Json) -> str:
    facts = [
        ("name", card["name"]),
        ("model", card["id"]),
        ("state", card["state"].lower()),
        ("error", card["error"]),
        ("owner", card["owner"]),
        ("source", card["source"]),
        ("sha256", card["sha256"]),
        ("digest", card["digest"]),
        ("tier", card["tier"]),
        ("pinned", "yes" if card["pinned"] else "no"),
        ("rank", card["rank"]),
        ("targets", ", ".join(card["targets"])),
        ("size", _size(card["bytes"])),
        ("base", f"{card['base']['served']}, by {card['base']['match']}" if card["base"]["match"] else None),
        ("proof", _proof(card["proof"])),
        ("answers", _answers(card["full_proof"])),
        ("served", f"{card['requests_served']} requests, the last {_ago(card['last_used'])}"),
    ]
    lines = [_aligned([(key, str(value)) for key, value in facts if value not in (None, "")])]
    rows = [
        (
            f"{version['number']}{'*' if version['is_current'] else ''}",
            version["digest"][:12],
            ",".join(version["aliases"]) or "-",
            version["tier"],
            _size(version["bytes"]),
            str(version["requests_served"]),
            _ago(version["last_used"]),
            version["source"],
        )
        for version in card["versions"]
    ]
    if rows:
        head = ("VERSION", "DIGEST", "ALIASES", "TIER", "SIZE", "SERVED", "LAST USED", "SOURCE")
        lines.append(_aligned([head, *rows]))
    return "\n\n".join(lines)


def _proof(proof: Json | None) -> str | None:
    if proof is None:
        return None
    said = f"{proof['verdict']}: {proof['num_modules']} modules as PEFT computes them, within {proof['max_error']:.1g}"
    return said if proof["has_effect"] else f"{said}; no effect, it adds nothing but zeros"


def _answers(proof: Json | None) -> str | None:
    if proof is None:
        return None
    if "error" in proof:
        return f"could not be compared with PEFT's: {proof['error']}"
    return (
        f"{proof['verdict']}: {proof['num_tokens_equal']} of {proof['num_tokens']} greedy tokens are PEFT's"
    )


def _line(card: Json) -> str:
    aliases = ", ".join(f"{alias} = {number}" for alias, number in sorted(card["aliases"].items()))
    return (
        (
            f"{card['name']} is version {card['version']}, {(card['digest'] or '-')[:12]}, in {card['tier']} memory"
            f"{', pinned' if card['pinned'] else ''}{f'; aliases: {aliases}' if aliases else ''}"
        )
        .replace("in disk memory", "on disk")
        .replace("in remote memory", "not on this machine")
    )


def _unloaded(answer: Json) -> str:
    aborted = f", {answer['requests_aborted']} requests ended" if answer["requests_aborted"] else ""
    said = (
        f"{answer['name']} is unloaded: {_size(answer['host_bytes'])} of host and"
        f" {_size(answer['device_bytes'])} of device memory are back{aborted}"
    )
    held = [f"{one['digest'][:12]} by {one['requests']} requests" for one in answer["held"]]
    return said + (f"; still held: {', '.join(held)}" if held else "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("the last unit takes all")


def _ago(unix: float | None) -> str:
    if unix is None:
        return "never"
    seconds = max(0, int(time.time() - unix))
    for count, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= count:
            return f"{seconds // count} {unit} ago"
    return f"{seconds} s ago"
