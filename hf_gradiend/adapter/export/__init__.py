"""Exports of an adapter for people without this package: a merged model, LoRA, Supertuning."""
