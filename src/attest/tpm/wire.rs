//! Big-endian integers and sized buffers (TPM2B), read within bounds.

use super::structures::TpmFormatError;

/// Reads from the front of a slice.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], TpmFormatError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(TpmFormatError::Truncated)?;
        self.0 = rest;
        Ok(head)
    }
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], TpmFormatError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(TpmFormatError::Truncated)?;
        self.0 = rest;
        Ok(*head)
    }
    pub fn u8(&mut self) -> Result<u8, TpmFormatError> {
        self.array().map(u8::from_be_bytes)
    }
    pub fn u16(&mut self) -> Result<u16, TpmFormatError> {
        self.array().map(u16::from_be_bytes)
    }
    pub fn u32(&mut self) -> Result<u32, TpmFormatError> {
        self.array().map(u32::from_be_bytes)
    }
    pub fn u64(&mut self) -> Result<u64, TpmFormatError> {
        self.array().map(u64::from_be_bytes)
    }
    /// A TPM2B: its size in 16 bits, then its bytes.
    pub fn sized(&mut self) -> Result<&'a [u8], TpmFormatError> {
        let size = self.u16()?;
        self.take(usize::from(size))
    }
    /// Nothing may follow.
    pub fn end(self) -> Result<(), TpmFormatError> {
        if self.0.is_empty() { Ok(()) } else { Err(TpmFormatError::Trailing) }
    }
}

/// Appends a TPM2B. The callers' buffers are far below 64 KiB.
pub(super) fn put_sized(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u16).to_be_bytes());
    out.extend_from_slice(bytes);
}
