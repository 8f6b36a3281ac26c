//! The words of guests and VMMs, made fit for a log: nothing in them moves a terminal's cursor, looks like a record of its
//! own, or fills a disk.

use std::borrow::Cow;
use std::fmt::Write;

/// How much a message keeps of what a guest or a VMM said, in bytes.
pub const SAID_BYTES: usize = 1024;
/// How long a log record, an error's message and an event's detail may be, in bytes.
pub const RECORD_BYTES: usize = 8192;

/// Control characters, the two separators that end a line like them, and what changes the direction of the text around it
/// (Unicode Standard Annex 9, section 2).
fn is_unfit(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}')
}

/// `text` with such characters escaped as Rust writes them, cut at about `limit` bytes; what is cut off is counted.
#[must_use]
pub fn printable(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit && !text.contains(is_unfit) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len().min(limit));
    for (at, c) in text.char_indices() {
        if shown.len() + c.len_utf8() > limit {
            write!(shown, "... ({} bytes more)", text.len() - at).expect("a string takes all that is written to it");
            break;
        }
        match is_unfit(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// What a guest or a VMM said, for a message.
#[must_use]
pub fn said(text: &str) -> Cow<'_, str> {
    printable(text, SAID_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn test_printable_leaves_plain_text_alone() {
        for text in ["", "plain", "naïve \\n \"quoted\" 漢字 हिन्दी"] {
            assert!(matches!(printable(text, 100), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn test_printable_escapes_what_moves_a_cursor_or_ends_a_line() {
        let hostile = "\u{1b}[2J\r\nERROR forged\u{9b}0m\u{2028}\u{202e}\0";
        assert_eq!(printable(hostile, 1000), r"\u{1b}[2J\r\nERROR forged\u{9b}0m\u{2028}\u{202e}\u{0}");
    }

    #[test]
    fn test_printable_cuts_and_counts_what_is_cut() {
        assert_eq!(printable(&"x".repeat(100_000), 10), "xxxxxxxxxx... (99990 bytes more)");
        assert_eq!(printable("ééé", 5), "éé... (2 bytes more)");
    }

    proptest! {
        #[test]
        fn test_printable_is_one_short_line_whatever_is_said(text in any::<String>(), limit in 0usize..50) {
            let shown = printable(&text, limit);
            prop_assert!(!shown.contains(is_unfit));
            prop_assert!(shown.len() <= limit + 40);
            prop_assert_eq!(printable(&shown, 1000), shown.clone());
        }
    }
}
