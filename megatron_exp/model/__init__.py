"""The language model: OLMo-2 on megatron-core, its optimizer, one update, and scoring. `presets` alone is free of torch."""
