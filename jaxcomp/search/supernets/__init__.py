"""Supernets without special layers: sub-networks as masks over the largest model's parameters."""

from jaxcomp.search.supernets.net import Supernet, supernet
from jaxcomp.search.supernets.subnetwork import Subnetwork
from jaxcomp.search.supernets.training import Sandwich, recalibrate, sandwich

__all__ = [
    "Sandwich",
    "Subnetwork",
    "Supernet",
    "recalibrate",
    "sandwich",
    "supernet",
]
