//! Server-sent events, decoded piece by piece as bytes come in. What is kept is bounded.

use thiserror::Error;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SseEvent {
    /// Its `event` field; empty when it had none.
    pub event: String,
    /// Its `data` lines, joined by line feeds.
    pub data: String,
}

/// Why a stream cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SseError {
    /// One event is larger than allowed.
    #[error("an event of the stream is larger than {0} bytes")]
    TooLarge(usize),
    /// It is not text.
    #[error("the stream is not UTF-8")]
    NotText,
}

/// Decodes a stream of events. Lines may end in LF, CRLF or CR, wherever the pieces are cut.
#[derive(Debug)]
pub struct SseDecoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that have been decoded.
    done: usize,
    /// Bytes of `buffer` that were looked through for the end of a line.
    seen: usize,
    /// The last line ended in CR: a LF that follows belongs to it.
    after_cr: bool,
    at_start: bool,
    event: String,
    data: Option<String>,
    max_event: usize,
}

const BOM: &[u8] = b"\xef\xbb\xbf";

impl SseDecoder {
    /// A decoder that gives up on an event larger than this.
    pub fn new(max_event: usize) -> Self {
        Self {
            buffer: Vec::new(),
            done: 0,
            seen: 0,
            after_cr: false,
            at_start: true,
            event: String::new(),
            data: None,
            max_event,
        }
    }

    /// Takes in a piece. Call [`Self::next_event`] until it has no more before the next piece.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.done > 0 {
            self.buffer.drain(..self.done);
            self.seen -= self.done;
            self.done = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event.
    pub fn next_event(&mut self) -> Result<Option<SseEvent>, SseError> {
        while let Some(line) = self.next_line() {
            if let Some(event) = self.take_line(line)? {
                return Ok(Some(event));
            }
        }
        // The line under way counts too: it could go on for ever.
        let held = self.buffer.len() - self.done + self.data.as_ref().map_or(0, String::len);
        if held > self.max_event { Err(SseError::TooLarge(self.max_event)) } else { Ok(None) }
    }

    /// The stream has ended: an event whose lines are whole is given out even without the empty line after it, for some servers
    /// leave that away.
    pub fn finish(&mut self) -> Option<SseEvent> {
        self.dispatch()
    }

    /// The range of the next whole line, without its end.
    fn next_line(&mut self) -> Option<std::ops::Range<usize>> {
        if self.after_cr && self.done < self.buffer.len() {
            self.after_cr = false;
            if self.buffer[self.done] == b'\n' {
                self.done += 1;
            }
        }
        self.seen = self.seen.max(self.done);
        let Some(length) = self.buffer[self.seen..].iter().position(|&byte| byte == b'\n' || byte == b'\r') else {
            self.seen = self.buffer.len();
            return None;
        };
        let end = self.seen + length;
        let line = self.done..end;
        self.after_cr = self.buffer[end] == b'\r';
        self.done = end + 1;
        self.seen = self.done;
        Some(line)
    }

    fn take_line(&mut self, line: std::ops::Range<usize>) -> Result<Option<SseEvent>, SseError> {
        let mut bytes = &self.buffer[line];
        if std::mem::take(&mut self.at_start) {
            bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
        }
        let line = std::str::from_utf8(bytes).map_err(|_| SseError::NotText)?;
        if line.is_empty() {
            return Ok(self.dispatch());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event),
            "data" => match &mut self.data {
                None => self.data = Some(value.to_owned()),
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
            },
            // Comments, ids and retry times mean nothing here: a stream is never resumed.
            _ => {}
        }
        if self.data.as_ref().map_or(0, String::len) + self.event.len() > self.max_event {
            return Err(SseError::TooLarge(self.max_event));
        }
        Ok(None)
    }

    fn dispatch(&mut self) -> Option<SseEvent> {
        let event = std::mem::take(&mut self.event);
        self.data.take().map(|data| SseEvent { event, data })
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn decode(pieces: &[&[u8]]) -> Result<Vec<SseEvent>, SseError> {
        let mut decoder = SseDecoder::new(1 << 16);
        let mut events = Vec::new();
        for piece in pieces {
            decoder.push(piece);
            while let Some(event) = decoder.next_event()? {
                events.push(event);
            }
        }
        events.extend(decoder.finish());
        Ok(events)
    }

    fn event(event: &str, data: &str) -> SseEvent {
        SseEvent { event: event.into(), data: data.into() }
    }

    #[test]
    fn fields_comments_and_line_ends_are_read_as_the_standard_says() {
        let stream = b"\xef\xbb\xbf: hello\nevent: a\ndata: 1\r\ndata:2\rdata\n\n\nid: 7\nretry: 5\n\ndata:  x:y\n\r\nevent: only\n\n";
        assert_eq!(decode(&[stream]).unwrap(), [event("a", "1\n2\n"), event("", " x:y")]);
        // The last event lacks its empty line; a torn line is none.
        assert_eq!(decode(&[b"data: [DONE]\n"]).unwrap(), [event("", "[DONE]")]);
        assert_eq!(decode(&[b"data: {\"to"]).unwrap(), []);
        assert_eq!(decode(&[b"data: \xff\n\n"]), Err(SseError::NotText));
    }

    #[test]
    fn an_endless_line_and_an_endless_event_are_given_up_on() {
        let mut decoder = SseDecoder::new(1000);
        let mut fed = 0;
        let error = loop {
            decoder.push(&[b'x'; 100]);
            fed += 100;
            if let Err(error) = decoder.next_event() {
                break error;
            }
            assert!(fed < 2000);
        };
        assert_eq!(error, SseError::TooLarge(1000));
        let mut decoder = SseDecoder::new(1000);
        let lines = "data: 0123456789\n".repeat(200);
        decoder.push(lines.as_bytes());
        assert_eq!(decoder.next_event(), Err(SseError::TooLarge(1000)));
    }

    fn cut(bytes: &[u8], cuts: &[usize]) -> Vec<Vec<u8>> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        at.windows(2).map(|pair| bytes[pair[0]..pair[1]].to_vec()).collect()
    }

    proptest! {
        #[test]
        fn events_survive_any_line_ends_and_any_cuts(
            events in prop::collection::vec(("[a-z_]{0,8}", prop::collection::vec("[^\r\n\u{feff}]{0,20}", 1..4)), 0..8),
            ends in prop::collection::vec(0_usize..3, 64),
            cuts in prop::collection::vec(any::<usize>(), 0..20),
        ) {
            let mut ends = ends.iter().cycle().map(|&end| ["\n", "\r\n", "\r"][end]);
            let mut text = String::new();
            let mut wanted = Vec::new();
            for (name, lines) in &events {
                if !name.is_empty() {
                    let _ = write!(text, "event:{name}{}", ends.next().unwrap());
                }
                for line in lines {
                    let _ = write!(text, "data: {line}{}", ends.next().unwrap());
                }
                // A CR before a LF would be one line end, not two.
                text.push_str("\r\n");
                text.push_str(": comment\n");
                wanted.push(event(name, &lines.join("\n")));
            }
            // After a line ended by a bare CR, `\r\n` is an empty line all the same.
            let pieces = cut(text.as_bytes(), &cuts);
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(decode(&pieces).unwrap(), wanted);
        }

        #[test]
        fn any_bytes_at_all_are_decoded_the_same_however_they_are_cut(
            bytes in prop::collection::vec(prop::sample::select(b"data: event\n\r\n\xef\xbb\xbf\xffx{".to_vec()), 0..200),
            cuts in prop::collection::vec(any::<usize>(), 0..20),
        ) {
            let pieces = cut(&bytes, &cuts);
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(decode(&pieces), decode(&[&bytes]));
        }
    }
}
