"""Whole protocols by name: settings, options of tasks and sizes that belong together, each with its source."""

from spd_lens.protocols.base import Name, Protocol, Source
from spd_lens.protocols.presets import POINTS, PROTOCOLS
from spd_lens.protocols.protocol import departures, protocol, with_protocol

__all__ = ["POINTS", "PROTOCOLS", "Name", "Protocol", "Source", "departures", "protocol", "with_protocol"]
