//! Texts for people that may repeat what others wrote.

use std::borrow::Cow;

/// The text, or its beginning and its end with how much is left out between them, in `most` characters or a few more.
pub fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    let kept = most / 2;
    let head = text.char_indices().nth(kept).map(|(at, _)| at);
    let tail = text.char_indices().rev().nth(kept.saturating_sub(1)).map(|(at, _)| at);
    match (head, tail) {
        // What is left out must be worth the words about it.
        (Some(head), Some(tail)) if tail > head + 32 => {
            format!("{} … {} bytes … {}", &text[..head], tail - head, &text[tail..]).into()
        }
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::shortened;

    #[test]
    fn long_texts_keep_both_ends_and_short_ones_all() {
        assert_eq!(shortened("short", 10), "short");
        let long = format!("{}{}{}", "ä".repeat(100), "x".repeat(1 << 20), "ü".repeat(100));
        let short = shortened(&long, 100);
        assert!(short.starts_with("ä") && short.ends_with("ü") && short.chars().count() < 140, "{short}");
        assert_eq!(shortened("", 0), "");
        // Twice is as once, nearly: the second time there is little left to leave out.
        assert!(shortened(&short, 100).chars().count() < 140);
    }
}
