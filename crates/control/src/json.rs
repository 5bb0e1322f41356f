//! Writes JSON that is ASCII only.
//!
//! The Node clients decode every received chunk on its own, so a character of several bytes that falls on a chunk border
//! reaches them as rubbish. Escaping everything above ASCII is what keeps them whole.

/// One JSON object under construction, appended to a buffer.
pub(crate) struct Object<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl<'a> Object<'a> {
    /// Opens an object.
    pub(crate) fn begin(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, first: true }
    }

    /// Closes the object.
    pub(crate) fn end(self) {
        self.out.push(b'}');
    }

    fn key(&mut self, key: &str) {
        if !std::mem::take(&mut self.first) {
            self.out.push(b',');
        }
        push_text(self.out, key);
        self.out.push(b':');
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        push_text(self.out, value);
    }

    /// Text, or null when there is none.
    pub(crate) fn text_or_null(&mut self, key: &str, value: &str) {
        if value.is_empty() { self.null(key) } else { self.text(key, value) }
    }

    pub(crate) fn number(&mut self, key: &str, value: i64) {
        self.key(key);
        push_number(self.out, value);
    }

    pub(crate) fn flag(&mut self, key: &str, value: bool) {
        self.key(key);
        self.out.extend_from_slice(if value { b"true" } else { b"false" });
    }

    pub(crate) fn null(&mut self, key: &str) {
        self.key(key);
        self.out.extend_from_slice(b"null");
    }

    /// A value that is valid JSON already.
    pub(crate) fn raw(&mut self, key: &str, json: &str) {
        self.key(key);
        push_json(self.out, json);
    }

    /// A value that `write` appends.
    pub(crate) fn with(&mut self, key: &str, write: impl FnOnce(&mut Vec<u8>)) {
        self.key(key);
        write(self.out);
    }
}

/// Appends an array, one element per item.
pub(crate) fn push_array<I: IntoIterator>(out: &mut Vec<u8>, items: I, mut write: impl FnMut(&mut Vec<u8>, I::Item)) {
    out.push(b'[');
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(out, item);
    }
    out.push(b']');
}

/// Appends a whole number.
pub(crate) fn push_number(out: &mut Vec<u8>, value: i64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}

/// Appends a JSON string.
pub(crate) fn push_text(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut start = 0;
    while let Some(length) = bytes[start..].iter().position(|&byte| !is_plain(byte)) {
        let at = start + length;
        out.extend_from_slice(&bytes[start..at]);
        let byte = bytes[at];
        if byte.is_ascii() {
            push_escaped_ascii(out, byte);
            start = at + 1;
        } else {
            start = at + push_escaped_char(out, &text[at..]);
        }
    }
    out.extend_from_slice(&bytes[start..]);
    out.push(b'"');
}

/// Appends JSON text as it is, but for what a line of ours must not hold: characters above ASCII are escaped (valid JSON
/// has them only inside strings) and line ends become spaces (valid JSON has them only outside).
pub(crate) fn push_json(out: &mut Vec<u8>, json: &str) {
    let bytes = json.as_bytes();
    let mut start = 0;
    while let Some(length) = bytes[start..].iter().position(|&byte| byte < b' ' || !byte.is_ascii()) {
        let at = start + length;
        out.extend_from_slice(&bytes[start..at]);
        if bytes[at].is_ascii() {
            out.push(b' ');
            start = at + 1;
        } else {
            start = at + push_escaped_char(out, &json[at..]);
        }
    }
    out.extend_from_slice(&bytes[start..]);
}

fn is_plain(byte: u8) -> bool {
    (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\'
}

fn push_escaped_ascii(out: &mut Vec<u8>, byte: u8) {
    match byte {
        b'"' => out.extend_from_slice(b"\\\""),
        b'\\' => out.extend_from_slice(b"\\\\"),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        _ => push_unit(out, u16::from(byte)),
    }
}

/// Escapes the first character of `text` and says how many bytes it had.
fn push_escaped_char(out: &mut Vec<u8>, text: &str) -> usize {
    let Some(character) = text.chars().next() else { return 0 };
    for unit in character.encode_utf16(&mut [0; 2]) {
        push_unit(out, *unit);
    }
    character.len_utf8()
}

fn push_unit(out: &mut Vec<u8>, unit: u16) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.extend_from_slice(b"\\u");
    for shift in [12, 8, 4, 0] {
        out.push(HEX[usize::from(unit >> shift & 0xf)]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    proptest! {
        #[test]
        fn text_is_ascii_and_reads_back(text in ".*") {
            let mut out = Vec::new();
            push_text(&mut out, &text);
            prop_assert!(out.is_ascii() && !out.contains(&b'\n'));
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }

        #[test]
        fn foreign_json_keeps_its_meaning(text in ".*", number in any::<i64>(), deep in 0..4_usize) {
            let mut value = serde_json::json!({ text.clone(): text, "n": number });
            for _ in 0..deep {
                value = serde_json::json!([value, "\u{1f600}\n"]);
            }
            let pretty = serde_json::to_string_pretty(&value).unwrap();
            let mut out = Vec::new();
            push_json(&mut out, &pretty);
            prop_assert!(out.is_ascii() && !out.contains(&b'\n'));
            prop_assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), value);
        }

        #[test]
        fn numbers_read_back(number in any::<i64>()) {
            let mut out = Vec::new();
            push_number(&mut out, number);
            prop_assert_eq!(std::str::from_utf8(&out).unwrap().parse::<i64>().unwrap(), number);
        }
    }

    #[test]
    fn above_the_basic_plane_a_pair_is_written() {
        let mut out = Vec::new();
        push_text(&mut out, "a\u{1f600}\u{7f}é");
        assert_eq!(out, br#""a\ud83d\ude00\u007f\u00e9""#);
    }
}
