"""Settings that are each in range but not together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mlx_serving.model_entry import parse_adapter

if TYPE_CHECKING:
    from mlx_serving.config import Config


def contradictions(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    """What is wrong, one line each; `places` says where a setting was given."""
    yield from _contradicting_models(config, places)
    if config.tls_key is not None and config.tls_cert is None:
        yield f"{places.get('tls_key', 'tls_key')}: a key without a certificate (tls_cert)"
    if config.worker_rss_limit_bytes and not config.supervise:
        place = places.get("worker_rss_limit_bytes", "worker_rss_limit_bytes")
        yield f"{place}: without a supervisor (supervise) no worker can be replaced"
    for origin in config.cors_origin:
        if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/*\s]+/?", origin):
            place = places.get("cors_origin", "cors_origin")
            yield f"{place}: '{origin}' is no origin; expected one like https://chat.example.org"
    yield from _wrong_webhook(config, places.get("alert_webhook", "alert_webhook"))
    for item in config.class_queue:
        if not re.fullmatch(r"(critical|high|normal|low)=[0-9]{1,9}", item):
            place = places.get("class_queue", "class_queue")
            yield f"{place}: expected CLASS=COUNT with CLASS one of critical, high, normal, low, got '{item}'"


def _wrong_webhook(config: Config, place: str) -> Iterator[str]:
    """The URL itself is not shown: it may carry a key."""
    if config.alert_webhook is None:
        return
    url, _, key = config.alert_webhook.partition("#")
    if not re.fullmatch(r"https?://[^\s/?]+(?:[/?]\S*)?", url):
        yield f"{place}: is no URL; expected one like https://hooks.example.org/services/x"
    elif not key and config.alert_format == "pagerduty":
        yield f"{place}: PagerDuty's routing key is missing behind a #"


def _wrong_adapters(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    models = places.get("models", "models")
    given = [(places.get("adapter", "adapter"), "[MODEL+]NAME=FOLDER", config.adapter)]
    given += [
        (f"{models}[{i}].adapters", "NAME=FOLDER", entry.adapters)
        for i, entry in enumerate(config.entries)
    ]
    for place, form, texts in given:
        for text in texts:
            adapter = parse_adapter(text)
            if adapter is None or (adapter.base and "MODEL" not in form):
                yield f"{place}: expected {form}, got '{text}'"


def _contradicting_models(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    names, models = config.served_model_name, places.get("models", "models")
    place = places.get("served_model_name", "served_model_name")
    if len(names) > len(config.models):
        yield f"{place}: {len(names)} names for {len(config.models)} model(s)"
    if len(set(names)) < len(names):
        yield f"{place}: a name is given twice"
    if names and any(entry.name for entry in config.entries):
        yield f"{place}: entries of models have names of their own"
    yield from _wrong_adapters(config, places)
    known = [entry.name or entry.model for entry in config.entries]
    if len(set(known)) < len(known):
        yield f"{models}: a model is given twice"
    for i, entry in enumerate(config.entries):
        of = config.of(entry)
        if of.kv_disk_path is not None and of.prefix_cache_bytes == 0:
            own = entry.settings.keys() & {"kv_disk_path", "prefix_cache_bytes"}
            where = (
                f"{models}[{i}].kv_disk_path" if own else places.get("kv_disk_path", "kv_disk_path")
            )
            yield f"{where}: needs a prefix cache in memory, and prefix_cache_bytes is 0"
            return
