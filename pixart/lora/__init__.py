"""Adapters: made, loaded, merged, saved."""

from pixart.lora.adapters import TARGETS, add_lora, load_lora, merge_lora, parse_lora, save_lora

__all__ = ["TARGETS", "add_lora", "load_lora", "merge_lora", "parse_lora", "save_lora"]
