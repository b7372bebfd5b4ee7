//! The messages of `tng/1` and their bytes: `version (1) | type (1) | length (4, big endian) | body`.

use tokio::io::{AsyncRead, AsyncReadExt};

use super::{CONFIRMATION_LEN, ID_LEN, NONCE_LEN, SessionError, SessionId};

/// First byte of each message.
pub const VERSION: u8 = 1;
/// Bytes before the body.
pub const HEADER_LEN: usize = 6;
/// Longest evidence, bytes. A TDX quote with its event log has about 50 KiB.
pub const MAX_EVIDENCE: usize = 256 * 1024;
/// Longest reason of a refusal, bytes.
pub const MAX_REASON: usize = 64;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The verifier asks for evidence about this nonce. `resume`: a confirmation that the peer knows the secret of
    /// this session would do.
    Ask {
        /// Fresh random bytes.
        nonce: [u8; NONCE_LEN],
        /// A session that this side bound earlier with the same key.
        resume: Option<SessionId>,
    },
    /// Instead of [`Message::Ask`]: the sender does not verify.
    Pass,
    /// Evidence, in the CBOR form of the certificate's evidence extension.
    Evidence(Vec<u8>),
    /// Instead of [`Message::Evidence`]: proof that the session's secret is known.
    Confirm([u8; CONFIRMATION_LEN]),
    /// The appraisal lets the peer in.
    Accept,
    /// The sender ends the exchange, for the reason with this slug.
    Refuse(String),
}

/// The types, by their byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ask = 1,
    Pass = 2,
    Evidence = 3,
    Confirm = 4,
    Accept = 5,
    Refuse = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Result<Self, SessionError> {
        Ok(match byte {
            1 => Self::Ask,
            2 => Self::Pass,
            3 => Self::Evidence,
            4 => Self::Confirm,
            5 => Self::Accept,
            6 => Self::Refuse,
            other => return Err(SessionError::UnknownMessage(other)),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ask => "ASK",
            Self::Pass => "PASS",
            Self::Evidence => "EVIDENCE",
            Self::Confirm => "CONFIRM",
            Self::Accept => "ACCEPT",
            Self::Refuse => "REFUSE",
        }
    }

    fn longest(self) -> usize {
        match self {
            Self::Ask => NONCE_LEN + ID_LEN,
            Self::Pass | Self::Accept => 0,
            Self::Evidence => MAX_EVIDENCE,
            Self::Confirm => CONFIRMATION_LEN,
            Self::Refuse => MAX_REASON,
        }
    }
}

/// Type and body length of a message that begins with `header`. Nothing of the body is read before this is known,
/// so that a peer cannot make this side wait for, or hold, more than the type may have.
fn header(header: &[u8; HEADER_LEN]) -> Result<(Kind, usize), SessionError> {
    let [version, kind, length @ ..] = *header;
    if version != VERSION {
        return Err(SessionError::Version(version));
    }
    let kind = Kind::from_byte(kind)?;
    let len = u32::from_be_bytes(length) as usize;
    if len > kind.longest() {
        return Err(SessionError::TooLarge { kind: kind.name(), len });
    }
    Ok((kind, len))
}

fn body(kind: Kind, body: Vec<u8>) -> Result<Message, SessionError> {
    let malformed = || SessionError::Malformed(kind.name());
    Ok(match kind {
        Kind::Ask => {
            let (nonce, id) = body.split_first_chunk().ok_or_else(malformed)?;
            let resume = match id {
                [] => None,
                id => Some(SessionId(id.try_into().map_err(|_| malformed())?)),
            };
            Message::Ask { nonce: *nonce, resume }
        }
        Kind::Pass | Kind::Accept if !body.is_empty() => return Err(malformed()),
        Kind::Pass => Message::Pass,
        Kind::Accept => Message::Accept,
        Kind::Evidence if body.is_empty() => return Err(malformed()),
        Kind::Evidence => Message::Evidence(body),
        Kind::Confirm => Message::Confirm(body.try_into().map_err(|_| malformed())?),
        Kind::Refuse => {
            let slug = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
            if body.is_empty() || !body.iter().all(slug) {
                return Err(malformed());
            }
            Message::Refuse(String::from_utf8(body).map_err(|_| malformed())?)
        }
    })
}

impl Message {
    /// The message's name, as the specification writes it.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Ask { .. } => Kind::Ask,
            Self::Pass => Kind::Pass,
            Self::Evidence(_) => Kind::Evidence,
            Self::Confirm(_) => Kind::Confirm,
            Self::Accept => Kind::Accept,
            Self::Refuse(_) => Kind::Refuse,
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let body = match self {
            Self::Ask { nonce, resume } => {
                let mut body = nonce.to_vec();
                body.extend(resume.iter().flat_map(|id| id.0));
                body
            }
            Self::Pass | Self::Accept => Vec::new(),
            Self::Evidence(bytes) => bytes.clone(),
            Self::Confirm(tag) => tag.to_vec(),
            Self::Refuse(reason) => reason.as_bytes().to_vec(),
        };
        let mut out = vec![VERSION, self.kind() as u8];
        // A body beyond 4 GiB cannot come about; the reader would refuse it.
        out.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(body);
        out
    }

    /// Takes one message from the beginning of `bytes`, and returns what follows it.
    ///
    /// # Errors
    /// [`SessionError::Truncated`] when `bytes` end within it, else what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), SessionError> {
        let (head, rest) = bytes.split_first_chunk().ok_or(SessionError::Truncated)?;
        let (kind, len) = header(head)?;
        let (inner, rest) = rest.split_at_checked(len).ok_or(SessionError::Truncated)?;
        Ok((body(kind, inner.to_vec())?, rest))
    }

    /// Reads one message and not a byte more: what follows the exchange belongs to the application.
    ///
    /// # Errors
    /// `Ok(Err(_))` when it is not a message, `Err(_)` when the connection fails otherwise than by ending.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Result<Self, SessionError>> {
        let mut head = [0; HEADER_LEN];
        // The first byte alone: one that is no version is refused at once, though its sender waits after it.
        for part in [0..1, 1..HEADER_LEN] {
            let version = part.start == 0;
            match from.read_exact(&mut head[part]).await {
                Ok(_) if version && head[0] != VERSION => return Ok(Err(SessionError::Version(head[0]))),
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(Err(SessionError::Truncated)),
                Err(e) => return Err(e),
            }
        }
        let (kind, len) = match header(&head) {
            Ok(found) => found,
            Err(e) => return Ok(Err(e)),
        };
        // Grows with what comes, not with what was announced.
        let mut inner = Vec::new();
        match from.take(len as u64).read_to_end(&mut inner).await {
            Ok(got) if got < len => return Ok(Err(SessionError::Truncated)),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(Err(SessionError::Truncated)),
            Err(e) => return Err(e),
            Ok(_) => {}
        }
        Ok(body(kind, inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<Message> {
        let id = SessionId([7; ID_LEN]);
        vec![
            Message::Ask { nonce: [1; NONCE_LEN], resume: None },
            Message::Ask { nonce: [2; NONCE_LEN], resume: Some(id) },
            Message::Pass,
            Message::Evidence(vec![0xda, 1, 2, 3]),
            Message::Confirm([3; CONFIRMATION_LEN]),
            Message::Accept,
            Message::Refuse("token-policy".into()),
        ]
    }

    #[test]
    fn each_message_comes_back_and_what_follows_is_left() {
        for message in all() {
            let mut bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Ok((message.clone(), &[][..])));
            for cut in 0..bytes.len() {
                assert_eq!(Message::decode(&bytes[..cut]), Err(SessionError::Truncated), "{message:?} at {cut}");
            }
            bytes.extend(b"GET /");
            assert_eq!(Message::decode(&bytes), Ok((message, &b"GET /"[..])));
        }
    }

    fn refused(kind: u8, body: &[u8]) -> &'static str {
        let mut bytes = vec![VERSION, kind];
        bytes.extend((body.len() as u32).to_be_bytes());
        bytes.extend(body);
        Message::decode(&bytes).map_or_else(|e| e.reason(), |_| "ok")
    }

    #[test]
    fn each_malformed_message_has_its_reason() {
        assert_eq!(Message::decode(b"GET / HTTP/1.1").unwrap_err().reason(), "session-version");
        assert_eq!(Message::decode(&[2, 1, 0, 0, 0, 0]).unwrap_err().reason(), "session-version");
        for kind in [0, 7, 255] {
            assert_eq!(refused(kind, &[]), "session-unknown-message");
        }
        for (kind, good, longest) in [(1, 32, 48), (4, 32, 32)] {
            assert_eq!(refused(kind, &vec![0; good]), "ok");
            assert_eq!(refused(kind, &vec![0; good - 1]), "session-malformed");
            assert_eq!(refused(kind, &vec![0; longest + 1]), "session-too-large");
        }
        for length in [33, 40, 47] {
            assert_eq!(refused(1, &vec![0; length]), "session-malformed");
        }
        for kind in [2, 5] {
            assert_eq!(refused(kind, b"x"), "session-too-large");
        }
        assert_eq!(refused(3, b""), "session-malformed");
        assert_eq!(refused(3, &vec![0; MAX_EVIDENCE]), "ok");
        assert_eq!(refused(3, &vec![0; MAX_EVIDENCE + 1]), "session-too-large");
        for text in ["", "Token", "a b", "a\n", "\u{e4}"] {
            assert_eq!(refused(6, text.as_bytes()), "session-malformed", "{text:?}");
        }
        assert_eq!(refused(6, &[b'a'; MAX_REASON + 1]), "session-too-large");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100_000, ..ProptestConfig::default() })]
        #[test]
        fn what_is_read_is_written_the_same_and_nothing_panics(
            version in prop_oneof![9 => Just(VERSION), 1 => any::<u8>()],
            kind in 0u8..8,
            announced in prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)],
            body in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut bytes = vec![version, kind];
            bytes.extend(announced.unwrap_or(body.len() as u32).to_be_bytes());
            bytes.extend(&body);
            match Message::decode(&bytes) {
                Ok((message, rest)) => prop_assert_eq!([&message.encode()[..], rest].concat(), bytes),
                Err(e) => prop_assert!(e.reason().starts_with("session-")),
            }
        }
    }
}
