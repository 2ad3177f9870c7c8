"""Three experiments for tests: texts, swaps and noise, with texts that try to break out of where they are shown."""
