"""Processes and devices: `device` alone knows CPU from CUDA, `layout` places this process among the others, which `launched` hears of."""
