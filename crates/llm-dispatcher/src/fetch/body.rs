//! From the bytes of an answer to text: what kind it is, how it is packed, and in which characters it is written.

use std::io::Read as _;

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};

use super::error::FetchError;

/// Kinds of documents that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Media {
    Html,
    /// Shown as it is: plain text, Markdown, CSV, XML, JSON.
    Text,
}

/// What a header says of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) media: Media,
    /// As the server names it, without parameters; guessed when it named none.
    pub(super) name: String,
    charset: Option<&'static Encoding>,
}

/// Judges the `Content-Type`. Without one the beginning of the body is looked at.
pub(super) fn kind(content_type: Option<&str>, body: &[u8]) -> Result<Kind, FetchError> {
    let Some(header) = content_type.map(str::trim).filter(|header| !header.is_empty()) else {
        let start = body[..body.len().min(512)].trim_ascii_start().to_ascii_lowercase();
        let html = start.starts_with(b"<!doctype html") || start.starts_with(b"<html");
        let (media, name) = if html { (Media::Html, "text/html") } else { (Media::Text, "text/plain") };
        return plain(Kind { media, name: name.to_owned(), charset: None }, body);
    };
    let mut parts = header.split(';');
    let name = parts.next().unwrap_or_default().trim().to_ascii_lowercase();
    let charset = parts.find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        let label = key.trim().eq_ignore_ascii_case("charset").then(|| value.trim().trim_matches(['"', '\'']))?;
        Encoding::for_label(label.as_bytes())
    });
    let media = match name.as_str() {
        "text/html" | "application/xhtml+xml" => Media::Html,
        "text/plain" | "text/markdown" | "text/csv" | "text/xml" | "application/xml" | "application/json" => {
            Media::Text
        }
        other if other.starts_with("application/") && (other.ends_with("+json") || other.ends_with("+xml")) => {
            Media::Text
        }
        _ => return Err(FetchError::ContentType { content_type: name.chars().take(80).collect() }),
    };
    plain(Kind { media, name, charset }, body)
}

/// Whether a kind alone already rules a document out, before its body is read.
pub(super) fn refused_by_name(content_type: Option<&str>) -> Result<(), FetchError> {
    kind(content_type, b"").map(|_| ())
}

/// A picture stays one under whatever name it is sent.
fn plain(kind: Kind, body: &[u8]) -> Result<Kind, FetchError> {
    let wide = kind.charset.is_some_and(|charset| !charset.is_ascii_compatible()) || Encoding::for_bom(body).is_some();
    if !wide && body[..body.len().min(1024)].contains(&0) {
        return Err(FetchError::ContentType { content_type: format!("binary data under the name {}", kind.name) });
    }
    Ok(kind)
}

/// Unpacks a body, at most `most` bytes of it. The flag says whether there was more.
pub(super) fn unpack(body: Vec<u8>, encoding: Option<&str>, most: usize) -> Result<(Vec<u8>, bool), FetchError> {
    let encoding = encoding.unwrap_or_default().trim().to_ascii_lowercase();
    let mut out = Vec::new();
    let bound = most as u64 + 1;
    let read = match encoding.as_str() {
        "" | "identity" => {
            out = body;
            Ok(0)
        }
        "gzip" | "x-gzip" => flate2::read::MultiGzDecoder::new(&*body).take(bound).read_to_end(&mut out),
        // By the standard with a header of zlib; some servers leave it out.
        "deflate" if body.first().is_some_and(|byte| byte & 15 == 8) => {
            flate2::read::ZlibDecoder::new(&*body).take(bound).read_to_end(&mut out)
        }
        "deflate" => flate2::read::DeflateDecoder::new(&*body).take(bound).read_to_end(&mut out),
        other => return Err(FetchError::Encoding { encoding: other.chars().take(40).collect() }),
    };
    // What came out before a broken end is text all the same; the flag tells that it is not all.
    let broken = read.is_err();
    let more = out.len() > most;
    out.truncate(most);
    Ok((out, more || broken))
}

/// The text, in the characters that its mark, its header, or its own head names; else UTF-8, else the web's old default.
pub(super) fn decode(body: &[u8], kind: &Kind) -> (String, &'static str) {
    let named = kind.charset.or_else(|| (kind.media == Media::Html).then(|| declared(body)).flatten());
    let encoding = match named {
        Some(encoding) => encoding,
        // The end may have been cut in the middle of a character.
        None => match std::str::from_utf8(body) {
            Ok(_) => UTF_8,
            Err(error) if error.error_len().is_none() => UTF_8,
            Err(_) => WINDOWS_1252,
        },
    };
    let (text, used, _) = encoding.decode(body);
    (text.into_owned(), used.name())
}

/// The `charset` of a `meta` in the first bytes.
fn declared(body: &[u8]) -> Option<&'static Encoding> {
    let head = body[..body.len().min(1024)].to_ascii_lowercase();
    let at = head.windows(8).position(|window| window == b"charset=")?;
    let label = head[at + 8..].trim_ascii_start();
    let label = label.strip_prefix(b"\"").or_else(|| label.strip_prefix(b"'")).unwrap_or(label);
    let end =
        label.iter().position(|byte| !byte.is_ascii_alphanumeric() && !matches!(byte, b'-' | b'_' | b':' | b'.'))?;
    // What could be read to find this can not be written in two bytes a character.
    Encoding::for_label(&label[..end]).map(|found| if found.is_ascii_compatible() { found } else { UTF_8 })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    #[test]
    fn only_documents_of_text_are_read() {
        for (header, media) in [
            (Some("text/html; charset=utf-8"), Media::Html),
            (Some("TEXT/HTML"), Media::Html),
            (Some("application/xhtml+xml"), Media::Html),
            (Some("text/plain"), Media::Text),
            (Some("application/ld+json"), Media::Text),
            (Some("application/rss+xml"), Media::Text),
            (Some(""), Media::Text),
            (None, Media::Text),
        ] {
            assert_eq!(kind(header, b"hello").unwrap().media, media, "{header:?}");
        }
        assert_eq!(kind(None, b"\n <!DOCTYPE HTML><p>").unwrap().media, Media::Html);
        for header in [
            "application/pdf",
            "image/png",
            "application/octet-stream",
            "video/mp4",
            "text/javascript",
            "multipart/x-mixed-replace",
            "html",
        ] {
            assert_eq!(kind(Some(header), b"").unwrap_err().code(), "content_type", "{header}");
        }
        assert_eq!(kind(Some("text/html"), b"\x89PNG\0\0").unwrap_err().code(), "content_type");
        assert_eq!(kind(None, b"\0\0\0").unwrap_err().code(), "content_type");
        assert!(
            kind(Some("text/plain; charset=utf-16le"), b"h\0i\0").is_ok()
                && kind(Some("text/plain"), b"\xff\xfeh\0i\0").is_ok()
        );
    }

    #[test]
    fn a_bomb_unpacks_to_the_bound_and_no_further() {
        let bomb = gzip(&vec![b'a'; 64 << 20]);
        assert!(bomb.len() < 100_000);
        let (out, more) = unpack(bomb, Some("gzip"), 2 << 20).unwrap();
        assert_eq!((out.len(), more), (2 << 20, true));
        let twice: Vec<u8> = [gzip(b"one "), gzip(b"two")].concat();
        assert_eq!(unpack(twice, Some(" GZIP "), 100).unwrap(), (b"one two".to_vec(), false));
        let cut = gzip(&(0..100_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
        let (out, more) = unpack(cut[..cut.len() / 2].to_vec(), Some("x-gzip"), 1 << 20).unwrap();
        assert!(more && !out.is_empty());
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(b"hello").unwrap();
        let mut raw = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        raw.write_all(b"hello").unwrap();
        for packed in [zlib.finish().unwrap(), raw.finish().unwrap()] {
            assert_eq!(unpack(packed, Some("deflate"), 100).unwrap(), (b"hello".to_vec(), false));
        }
        assert_eq!(unpack(vec![1, 2, 3], None, 2).unwrap(), (vec![1, 2], true));
        for other in ["br", "zstd", "gzip, gzip", "compress"] {
            assert_eq!(unpack(Vec::new(), Some(other), 9).unwrap_err().code(), "encoding", "{other}");
        }
    }

    #[test]
    fn characters_are_those_named_or_the_likeliest() {
        let text = |header: Option<&str>, body: &[u8]| decode(body, &kind(header, body).unwrap()).0;
        assert_eq!(text(Some("text/plain; charset=\"ISO-8859-2\""), b"\xa3\xf3d\xbc"), "Łódź");
        assert_eq!(
            text(Some("text/html"), b"<meta charset=windows-1251><p>\xcf\xf0\xe8\xe2\xe5\xf2"),
            "<meta charset=windows-1251><p>Привет"
        );
        assert_eq!(
            text(Some("text/html"), b"<meta http-equiv=x content='text/html; charset=koi8-r'>\xd7"),
            "<meta http-equiv=x content='text/html; charset=koi8-r'>в"
        );
        assert_eq!(text(Some("text/plain"), "naïve".as_bytes()), "naïve");
        assert_eq!(text(Some("text/plain"), b"na\xefve caf\xe9!"), "naïve café!");
        assert_eq!(text(Some("text/plain"), &"né".as_bytes()[..2]), "n\u{fffd}");
        assert_eq!(text(None, b"\xff\xfeh\0i\0"), "hi");
        assert_eq!(text(Some("text/plain; charset=nonsense"), b"plain"), "plain");
    }
}
