"""The deployment description: YAML plus command-line overrides, read once, typed and frozen.

Units are in the names, `None` means "found out at the start".  An unknown key is an error that
names it and the nearest key there is.  Measured facts (how many KV blocks fit, the device) are
not here: they come back in the agent's Ready message.
"""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
import yaml

from llm_serving.errors import ConfigError

__all__ = [
    "AgentConfig",
    "CacheConfig",
    "LoggingConfig",
    "ModelSection",
    "PrecisionConfig",
    "SchedulerConfig",
    "ServerConfig",
    "ServingConfig",
    "load_config",
]

_NAME = re.compile(r"[A-Za-z0-9]([\w.:/-]*[\w.:-])?", re.ASCII)
_METHODS = ("Execute", "Ping")  # the calls to an agent that are answered
_ROUTES = ("/generate", "/generate_stream", "/info", "/health")

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class ModelSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str = "smollm2-135m-instruct"  # a name `pull` knows, a folder, a .gguf file, a hub id
    served_names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["auto", "float32", "bfloat16", "int8", "native"] = "auto"  # auto: the file's
    max_model_len: Positive | None = None  # tokens of prompt and output; None: the model's own

    def __post_init__(self) -> None:
        for name in self.served_names or ():
            if not _NAME.fullmatch(name) or name.endswith(_ROUTES):
                raise ValueError(
                    f"served_names: {name!r} cannot stand in a URL; letters, digits and ._:/- can, "
                    f"and the end must not be one of {', '.join(_ROUTES)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called in URLs and metrics; by default llama2 and its own name."""
        own = pathlib.Path(self.path).absolute().name.removesuffix(".gguf").lower()
        own = re.sub(r"[^\w.:-]+", "-", own, flags=re.ASCII).strip("-.:") or "llama2"
        return self.served_names or tuple(dict.fromkeys(("llama2", own)))


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8835  # 0: any free one
    request_timeout_s: Seconds = 600.0  # the longest a request may wait and run
    shutdown_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0  # running requests may end
    max_body_bytes: Positive = 2 * 1024 * 1024


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 1024
    max_num_waiting: Positive = 1024
    max_step_stretch: Annotated[float, msgspec.Meta(gt=1)] = 2.2  # .inf: prompts take what is left
    burst_tokens: Positive = 8  # of a row, until which it waits for prompts that come with it
    prefix_caching: bool = True
    num_steps_in_flight: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16  # tokens
    num_blocks: Positive | None = None  # None: from the memory that is there
    dtype: Literal["auto", "int8"] = "auto"  # auto: the model's own


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    device: str = "auto"  # auto, cpu, cuda
    kernels: Literal["auto", "native", "reference"] = "auto"  # auto: native where they can run
    num_threads: Positive | None = None  # None: the processors this server may use
    transport: Literal["tcp", "unix"] = "tcp"  # control frames; tensors are in shared memory
    start_timeout_s: Seconds = 600.0
    step_timeout_s: Seconds = 300.0
    stall_s: Seconds = 30.0  # work outstanding and no layer finished for so long: not ready
    max_restarts: Annotated[int, msgspec.Meta(ge=0)] = 5  # within ten minutes
    transport_log: str | None = None  # a file that gets a line for each call to an agent
    transport_log_methods: tuple[str, ...] | None = None  # which calls; None: all

    def __post_init__(self) -> None:
        if self.transport_log_methods is None:
            return
        if unknown := ", ".join(sorted({*self.transport_log_methods} - {*_METHODS})):
            known = ", ".join(_METHODS)
            raise ValueError(
                f"transport_log_methods: the methods are {known}; found {unknown!r:.40}"
            )
        if self.transport_log is None:
            raise ValueError("transport_log_methods: there is no transport_log to choose for")


class PrecisionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dump_dir: str | None = None  # where the logits of chosen positions are written; None: nowhere
    every: Positive = 100  # positions that are multiples of it


class LoggingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ModelSection = ModelSection()
    server: ServerConfig = ServerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    kv_cache: CacheConfig = CacheConfig()
    agent: AgentConfig = AgentConfig()
    precision: PrecisionConfig = PrecisionConfig()
    logging: LoggingConfig = LoggingConfig()


def load_config(
    path: pathlib.Path | None, overrides: Mapping[str, object] | None = None
) -> ServingConfig:
    """Settings of a YAML file, with `overrides` ("scheduler.max_num_seqs": 8) on top.

    Raises ConfigError, naming the key, for anything that is unknown or out of range.
    """
    settings = {} if path is None else _read(path)
    config = _checked(settings, str(path))
    if overrides:
        for dotted, value in overrides.items():
            section, key = dotted.split(".")
            settings[section] = {**(settings.get(section) or {}), key: value}
        config = _checked(settings, "command line")
    return config


def _checked(settings: Mapping[str, Any], where: str) -> ServingConfig:
    _refuse_unknown(settings, ServingConfig, where)
    try:
        return msgspec.convert(settings, ServingConfig)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {_named(str(exc), settings)}") from exc


def _named(complaint: str, settings: Mapping[str, Any]) -> str:
    """msgspec's "Expected ... - at `$.a.b`" with the key first and what came last."""
    expected, _, path = complaint.partition(" - at `$.")
    if not path:
        return complaint
    dotted = path.rstrip("`")
    section, _, key = dotted.partition("[")[0].partition(".")
    if not key:  # said by a section's own check, which has named the key
        return f"{section}.{expected}"
    (kind,) = (f.type for f in msgspec.structs.fields(ServingConfig) if f.name == section)
    allowed = get_args(next(f.type for f in msgspec.structs.fields(kind) if f.name == key))
    if "enum" in expected:
        expected = f"expected one of {', '.join(map(str, allowed))}"
    found = settings[section][key]
    return f"{dotted}: {expected[0].lower()}{expected[1:]}, found {found!r:.60}"


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the configuration: {exc}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not YAML: {exc}") from exc
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:', found {settings!r:.60}")
    return settings


def _refuse_unknown(settings: Mapping[Any, Any], kind: type, where: str, inside: str = "") -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in settings.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            hint = f"did you mean {inside}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {inside}{key}; {hint}")
        inner = fields[key]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {inside}{key} is a section, found {value!r:.60}")
            _refuse_unknown(value, inner, where, f"{inside}{key}.")
