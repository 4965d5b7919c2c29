"""PEFT adapters on quantized layers: configure, train, load and merge LoRA."""
