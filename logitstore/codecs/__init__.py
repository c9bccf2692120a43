"""Codecs: a frozen configuration with targets_from_logits, targets_from_topk, encode and decode."""
