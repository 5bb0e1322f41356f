//! Reading and writing of single values. A reader never looks beyond its bytes and never allocates more than it was
//! given, whatever the bytes say.

use thiserror::Error;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WireError {
    /// They end too early.
    #[error("truncated")]
    Truncated,
    /// A length or count is greater than any that we write.
    #[error("{0} is too long")]
    TooLong(&'static str),
    /// A value that nobody writes.
    #[error("invalid {0}")]
    Invalid(&'static str),
    /// There is more behind the end.
    #[error("bytes behind the end")]
    Trailing,
}

/// Takes values off the front of some bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader of all of `bytes`.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    /// So many bytes.
    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A fixed number of bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// One byte.
    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Eight bytes, little end first.
    pub(super) fn fixed64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of seven bits per byte, in its shortest form.
    pub(super) fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0_u64;
        for index in 0..10 {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if index == 9 && bits > 1 {
                return Err(WireError::Invalid("number"));
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                // One value has one encoding, so that a signature covers what was meant.
                let shortest = index == 0 || byte != 0;
                return if shortest { Ok(value) } else { Err(WireError::Invalid("number")) };
            }
        }
        Err(WireError::Invalid("number"))
    }

    /// A number that fits a smaller type.
    pub(super) fn small<T: TryFrom<u64>>(&mut self, what: &'static str) -> Result<T, WireError> {
        T::try_from(self.varint()?).map_err(|_| WireError::Invalid(what))
    }

    /// How many things follow: at most `most`, and no more than there are bytes.
    pub(super) fn count(&mut self, most: usize, what: &'static str) -> Result<usize, WireError> {
        let count = usize::try_from(self.varint()?).map_err(|_| WireError::TooLong(what))?;
        if count > most {
            return Err(WireError::TooLong(what));
        }
        if count > self.left() {
            return Err(WireError::Truncated);
        }
        Ok(count)
    }

    /// Bytes behind their length.
    pub(super) fn bytes(&mut self, most: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        let length = self.count(most, what)?;
        self.take(length)
    }

    /// Yes or no.
    pub(super) fn flag(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Invalid(what)),
        }
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Trailing) }
    }
}

/// Appends values to a buffer.
pub(super) trait Put {
    /// Seven bits per byte, the least significant first.
    fn put_varint(&mut self, value: u64);
    /// Eight bytes, little end first.
    fn put_fixed64(&mut self, value: u64);
    /// Bytes behind their length.
    fn put_bytes(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    fn put_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.push(value as u8);
    }

    fn put_fixed64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_bytes(&mut self, bytes: &[u8]) {
        self.put_varint(bytes.len() as u64);
        self.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_number_has_one_encoding() {
        for (bytes, expected) in [
            (&[0x00][..], Ok(0)),
            (&[0x80, 0x01], Ok(128)),
            (&[0x80, 0x00], Err(WireError::Invalid("number"))),
            (&[0x80], Err(WireError::Truncated)),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], Ok(u64::MAX)),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02], Err(WireError::Invalid("number"))),
            (&[0xff; 12], Err(WireError::Invalid("number"))),
        ] {
            assert_eq!(Reader::new(bytes).varint(), expected, "{bytes:?}");
        }
    }

    #[test]
    fn a_length_is_believed_only_as_far_as_there_are_bytes() {
        let mut huge = Vec::new();
        huge.put_varint(u64::MAX);
        assert_eq!(Reader::new(&huge).bytes(64, "text"), Err(WireError::TooLong("text")));
        assert_eq!(Reader::new(&[60, 1, 2]).bytes(64, "text"), Err(WireError::Truncated));
        assert_eq!(Reader::new(&[65]).count(64, "list"), Err(WireError::TooLong("list")));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(value in any::<u64>(), bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut out = Vec::new();
            out.put_varint(value);
            out.put_bytes(&bytes);
            out.put_fixed64(value);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.varint(), Ok(value));
            prop_assert_eq!(reader.bytes(100, "bytes"), Ok(&bytes[..]));
            prop_assert_eq!(reader.fixed64(), Ok(value));
            prop_assert_eq!(reader.end(), Ok(()));
        }
    }
}
