import unicodedata

from megatron_exp.display.visible import visible, visible_line


def test_no_control_format_or_surrogate_character_survives():
    everything = "".join(map(chr, [*range(0x10000), *range(0xE0000, 0xE0200), 0x10FFFF]))
    shown = visible(everything, keep="")
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_ordinary_text_of_any_script_is_untouched():
    text = "Grüße, 你好, שלום, a\u00a0b 🎉 \\x41"
    assert visible(text) == text


def test_escapes_show_what_was_there():
    assert visible("\x1b[31m\u202e\U000e0001") == "\\x1b[31m\\u202e\\U000e0001"


def test_line_breaks_stay_in_texts_and_not_in_lines():
    assert visible("a\n\tb\r") == "a\n\tb\\r"
    assert visible_line("a\n\tb\r") == "a\\n\\tb\\r"
