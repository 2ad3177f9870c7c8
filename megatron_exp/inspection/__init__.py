"""Looking at corpora, manifests and runs, and proving that they are what they say. No torch; starts in well under a second.

    targets   what a path is: a corpus, a manifest or a run
    summary, slots, items, query, status   the answers, as plain data
    render    the same answers on a terminal;  document   as versioned JSON
    verify    everything that can be recomputed, recomputed

Texts from data reach the terminal only through `megatron_exp.display.visible`, as plain text, never as Rich markup.
"""
