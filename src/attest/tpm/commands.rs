//! The five commands that a quote needs, and what answers to them.

use std::io;

use super::PcrValue;
use super::structures::{KeyAlgorithm, PcrSelection, TpmFormatError, own_scheme, template};
use super::transport::{HEADER, MAX_MESSAGE, Transport};
use super::wire::{Reader, put_sized};

const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;
/// TPM_RS_PW: authorisation by password, here the empty one.
const PASSWORD: u32 = 0x4000_0009;
const SUCCESS: u32 = 0;

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Makes a primary key.
    CreatePrimary = 0x131,
    /// Quotes PCRs.
    Quote = 0x158,
    /// Forgets a key that was made.
    FlushContext = 0x165,
    /// Tells the public area of a key.
    ReadPublic = 0x173,
    /// Reads PCRs.
    PcrRead = 0x17e,
}

/// Why a command gave no result.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The way to the TPM broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The TPM refused.
    #[error("{command:?} answered error {code:#05x}")]
    Refused {
        /// What was asked.
        command: Command,
        /// TPM_RC.
        code: u32,
    },
    /// Its answer cannot be read.
    #[error("{0:?} answered something unreadable: {1}")]
    Unreadable(Command, TpmFormatError),
}

/// Under which seed a key is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hierarchy {
    /// TPM_RH_ENDORSEMENT: the key outlives TPM2_Clear, and quotes tell resets and firmware as they are.
    Endorsement = 0x4000_000b,
    /// TPM_RH_OWNER: TPM2_Clear ends the key; resets and firmware in its quotes are obfuscated.
    Owner = 0x4000_0001,
}

/// A TPM that is talked to.
pub struct Tpm<T>(pub T);

/// Handle and public area (TPMT_PUBLIC) of a key.
pub struct Key {
    /// Its handle.
    pub handle: u32,
    /// TPMT_PUBLIC.
    pub public: Vec<u8>,
}

/// A quote as the TPM signed it.
pub struct RawQuote {
    /// TPMS_ATTEST.
    pub message: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
}

impl<T: Transport> Tpm<T> {
    /// Runs a command with the empty password when `authorised`. Returns the parameters of the response, and the
    /// handle before them if `with_handle`.
    fn run(
        &mut self,
        command: Command,
        handle: Option<u32>,
        authorised: bool,
        parameters: &[u8],
        with_handle: bool,
    ) -> Result<(u32, Vec<u8>), CommandError> {
        let mut body = Vec::new();
        if let Some(handle) = handle {
            body.extend_from_slice(&handle.to_be_bytes());
        }
        if authorised {
            // One session of 9 bytes: no nonce, no attributes, no password.
            body.extend_from_slice(&9u32.to_be_bytes());
            body.extend_from_slice(&PASSWORD.to_be_bytes());
            body.extend_from_slice(&[0; 5]);
        }
        body.extend_from_slice(parameters);
        let tag = if authorised { SESSIONS } else { NO_SESSIONS };
        let mut message = tag.to_be_bytes().to_vec();
        message.extend_from_slice(&((HEADER + body.len()) as u32).to_be_bytes());
        message.extend_from_slice(&(command as u32).to_be_bytes());
        message.extend_from_slice(&body);
        let response = self.0.exchange(&message)?;
        read_response(command, &response, with_handle)
    }

    /// Makes the attestation key of `algorithm` under `hierarchy`, whose password is empty.
    pub fn create_primary(&mut self, hierarchy: Hierarchy, algorithm: KeyAlgorithm) -> Result<Key, CommandError> {
        let mut parameters = Vec::new();
        // TPM2B_SENSITIVE_CREATE: no password, no data.
        put_sized(&mut parameters, &[0; 4]);
        put_sized(&mut parameters, &template(algorithm));
        put_sized(&mut parameters, &[]);
        parameters.extend_from_slice(&0u32.to_be_bytes());
        let command = Command::CreatePrimary;
        let (handle, answer) = self.run(command, Some(hierarchy as u32), true, &parameters, true)?;
        match Reader(&answer).sized() {
            Ok(public) => Ok(Key { handle, public: public.to_vec() }),
            Err(e) => {
                let _ = self.flush(handle);
                Err(CommandError::Unreadable(command, e))
            }
        }
    }

    /// The key behind a handle.
    pub fn read_public(&mut self, handle: u32) -> Result<Key, CommandError> {
        let command = Command::ReadPublic;
        let (_, answer) = self.run(command, Some(handle), false, &[], false)?;
        let public = Reader(&answer).sized().map_err(|e| CommandError::Unreadable(command, e))?;
        Ok(Key { handle, public: public.to_vec() })
    }

    /// Forgets a key of [`Tpm::create_primary`].
    pub fn flush(&mut self, handle: u32) -> Result<(), CommandError> {
        self.run(Command::FlushContext, Some(handle), false, &[], false).map(|_| ())
    }

    /// Quotes `selection` with the key behind `handle`.
    pub fn quote(&mut self, handle: u32, extra: &[u8], selection: PcrSelection) -> Result<RawQuote, CommandError> {
        let mut parameters = Vec::new();
        put_sized(&mut parameters, extra);
        parameters.extend_from_slice(&own_scheme());
        selection.put(&mut parameters);
        let command = Command::Quote;
        let (_, answer) = self.run(command, Some(handle), true, &parameters, false)?;
        let mut reader = Reader(&answer);
        let message = reader.sized().map_err(|e| CommandError::Unreadable(command, e))?.to_vec();
        Ok(RawQuote { message, signature: reader.0.to_vec() })
    }

    /// Values of `selection`, in ascending order. A TPM tells some of them at a time.
    pub fn read_pcrs(&mut self, selection: PcrSelection) -> Result<Vec<(u8, PcrValue)>, CommandError> {
        let command = Command::PcrRead;
        let mut values = Vec::new();
        let mut wanted = Some(selection);
        while let Some(asked) = wanted {
            let mut parameters = Vec::new();
            asked.put(&mut parameters);
            let (_, answer) = self.run(command, None, false, &parameters, false)?;
            let (told, some) = read_pcr_answer(&answer).map_err(|e| CommandError::Unreadable(command, e))?;
            if told.without(asked).is_some() {
                return Err(CommandError::Unreadable(command, TpmFormatError::Value("PCRs nobody asked for")));
            }
            values.extend(told.iter().zip(some));
            wanted = asked.without(told);
        }
        values.sort_unstable_by_key(|(pcr, _)| *pcr);
        Ok(values)
    }
}

fn read_pcr_answer(answer: &[u8]) -> Result<(PcrSelection, Vec<PcrValue>), TpmFormatError> {
    let mut reader = Reader(answer);
    let _updates = reader.u32()?;
    // Without progress the caller would ask for ever.
    let told = PcrSelection::read(&mut reader)?.ok_or(TpmFormatError::Value("no PCR is told: is there a bank?"))?;
    if reader.u32()? as usize != told.count() {
        return Err(TpmFormatError::Value("not a value for each PCR"));
    }
    let value = |reader: &mut Reader<'_>| {
        reader.sized()?.try_into().map_err(|_| TpmFormatError::Value("a PCR that is not 32 bytes long"))
    };
    let values = (0..told.count()).map(|_| value(&mut reader)).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok((told, values))
}

fn read_response(command: Command, response: &[u8], with_handle: bool) -> Result<(u32, Vec<u8>), CommandError> {
    let unreadable = |e| CommandError::Unreadable(command, e);
    let mut reader = Reader(response);
    let tag = reader.u16().map_err(unreadable)?;
    let size = reader.u32().map_err(unreadable)? as usize;
    let code = reader.u32().map_err(unreadable)?;
    if size != response.len() || size > MAX_MESSAGE {
        return Err(unreadable(TpmFormatError::Value("its size is not the one it names")));
    }
    if code != SUCCESS {
        return Err(CommandError::Refused { command, code });
    }
    let handle = if with_handle { reader.u32().map_err(unreadable)? } else { 0 };
    let parameters = match tag {
        NO_SESSIONS => reader.0,
        // What follows the parameters belongs to the session.
        SESSIONS => {
            let size = reader.u32().map_err(unreadable)? as usize;
            reader.take(size).map_err(unreadable)?
        }
        _ => return Err(unreadable(TpmFormatError::Value("an unknown tag"))),
    };
    Ok((handle, parameters.to_vec()))
}

#[cfg(test)]
#[path = "commands_tests.rs"]
mod tests;
