//! The exchange itself. Messages go in one fixed order: the client asks first, so that a server proves itself before
//! it is shown evidence; a server's question does not wait for the client's verdict.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use aws_lc_rs::rand;
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsStream;

use super::error::UNATTESTED;
use super::keys::Half;
use super::memory::{Lead, Turn};
use super::{BoundSession, Door, Ending, Message, NONCE_LEN, Proven, Role, SessionError};
use crate::attest::{
    AttestError, Attester, Credential, EXPORTER, EvidenceError, NONCE, PUBKEY_HASH, RuntimeData, Verdict,
};
use crate::config::Model;
use crate::tls::certificate::fingerprint;
use crate::tls::peer::{self, PeerCertificate};
use crate::tls::{ChannelError, PeerError};

/// How long telling the peer why it is refused may take: it may be gone, or not read.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How often the kernel is asked whether the peer has it. No event tells.
const SETTLING: Duration = Duration::from_millis(2);

/// This side as one that attests.
pub struct Prover<'a> {
    /// Makes the evidence.
    pub attester: &'a dyn Attester,
    /// DER SubjectPublicKeyInfo of the certificate shown in this connection's handshake.
    pub spki: &'a [u8],
    /// Sessions proved earlier.
    pub proven: &'a Proven,
    /// Evidence under way at once; the others wait.
    pub places: &'a Semaphore,
}

/// This side as one that verifies.
#[async_trait]
pub trait Asker: Send + Sync {
    /// How this connection is appraised.
    async fn turn(&self, key: [u8; 32]) -> Result<Turn, ChannelError>;
    /// A new verdict.
    async fn appraise(&self, shown: PeerCertificate) -> Result<Verdict, ChannelError>;
    /// Keeps a session that was bound although another one could have been resumed.
    fn keep(&self, session: Arc<BoundSession>);
    /// Whether a session that was named in this exchange may be named still: the peer could have taken its time.
    fn holds(&self, _session: &BoundSession) -> bool {
        true
    }
    /// Evidence came, whatever it is worth: its bytes, and what it has to be about.
    fn witness(&self, _evidence: &[u8], _expected: &RuntimeData) {}
    /// What the peer has to show.
    fn model(&self) -> Model;
    /// The time.
    fn now(&self) -> std::time::SystemTime;
}

/// What a verifying side has at the end.
pub struct Bound {
    /// The session in which the peer was appraised: this one or an earlier one.
    pub session: Arc<BoundSession>,
    /// Whether it is an earlier one.
    pub resumed: bool,
}

/// How an exchange ended well.
pub struct Outcome {
    /// The peer's session, if this side verifies.
    pub bound: Option<Bound>,
    /// How the peer, if it asked, was shown who this side is.
    pub proved: Option<Proof>,
}

/// What a peer accepted this side by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// Evidence about this connection.
    Evidence,
    /// The secret of an earlier session.
    Confirmation,
}

/// What was asked.
struct Asked {
    spki: Vec<u8>,
    not_after: std::time::SystemTime,
    turn: Turn,
    nonce: [u8; NONCE_LEN],
    expected: RuntimeData,
}

/// One exchange.
pub struct Exchange<'a> {
    stream: &'a mut TlsStream<TcpStream>,
    role: Role,
    /// Messages that leave together, with the next flush.
    queue: Vec<u8>,
    /// What is left of messages that are leaving.
    leaving: Vec<u8>,
    /// Nothing that the peer would wait for comes behind what is queued.
    is_last: bool,
    /// The same of what has begun to leave: the peer may be done, and would take a message for the application's bytes.
    is_over: bool,
}

enum Ended {
    Itself(Result<Outcome, ChannelError>),
    Cut(ChannelError),
}

impl<'a> Exchange<'a> {
    /// Over a stream whose handshake is done.
    pub fn new(stream: &'a mut TlsStream<TcpStream>) -> Self {
        let role = if matches!(stream, TlsStream::Client(_)) { Role::Client } else { Role::Server };
        Self { stream, role, queue: Vec::new(), leaving: Vec::new(), is_last: false, is_over: false }
    }

    /// Runs it to its end. `prover`: if this side attests; `asker`: if it verifies; `door`: of a server that serves
    /// something. `ending` cuts it short.
    /// A peer that is refused is told the reason's slug, as long as it waits for a message.
    pub async fn run(
        mut self,
        prover: Option<Prover<'_>>,
        asker: Option<&dyn Asker>,
        door: Option<&dyn Door>,
        ending: Ending<'_>,
    ) -> Result<Outcome, ChannelError> {
        let ended = {
            let work = async {
                match self.role {
                    Role::Client => self.as_client(prover, asker).await,
                    Role::Server => self.as_server(prover, asker, door).await,
                }
            };
            tokio::select! {
                biased;
                outcome = work => Ended::Itself(outcome),
                error = ending => Ended::Cut(error),
            }
        };
        match ended {
            Ended::Itself(Err(error)) => {
                if !matches!(error, ChannelError::Session(SessionError::Refused(_))) {
                    self.refuse(&error).await;
                }
                Err(error)
            }
            Ended::Cut(error) => {
                // REFUSE takes the place of what has not begun to leave; behind ACCEPT nobody would read it as a message.
                self.queue.clear();
                if !self.is_over {
                    self.refuse(&error).await;
                }
                Err(error)
            }
            Ended::Itself(done) => done,
        }
    }

    /// Tells the peer why this side ends the exchange.
    async fn refuse(&mut self, error: &ChannelError) {
        self.queue(Message::Refuse(error.reason().into()));
        let told = async {
            self.write().await?;
            settled(self.stream.get_ref().0).await;
            std::io::Result::Ok(())
        };
        let _ = timeout(LAST_WORD, told).await;
    }

    async fn as_client(
        &mut self,
        prover: Option<Prover<'_>>,
        asker: Option<&dyn Asker>,
    ) -> Result<Outcome, ChannelError> {
        let asked = self.ask(asker).await?;
        self.flush().await?;
        let bound = self.judge(asker, asked).await?;
        if bound.is_some() {
            self.queue(Message::Accept);
        }
        // The server asks without having seen ACCEPT, which so leaves together with the answer.
        let proved = self.prove(prover).await?;
        self.is_last = true;
        self.flush().await?;
        if proved.is_some() {
            self.accepted().await?;
        }
        Ok(Outcome { bound, proved })
    }

    async fn as_server(
        &mut self,
        prover: Option<Prover<'_>>,
        asker: Option<&dyn Asker>,
        door: Option<&dyn Door>,
    ) -> Result<Outcome, ChannelError> {
        // Nothing may keep this answer waiting but the attester: the client's other connections may wait for it.
        let proved = self.prove(prover).await?;
        let asked = self.ask(asker).await?;
        self.flush().await?;
        if proved.is_some() {
            self.accepted().await?;
        }
        let bound = self.judge(asker, asked).await?;
        if let (Some(asker), Some(bound)) = (asker, &bound) {
            if let Some(door) = door {
                door.open(&bound.session.verdict).await?;
                still(asker, bound)?;
            }
            self.queue(Message::Accept);
            self.is_last = true;
        }
        self.flush().await?;
        Ok(Outcome { bound, proved })
    }

    async fn ask(&mut self, asker: Option<&dyn Asker>) -> Result<Option<Asked>, ChannelError> {
        let Some(asker) = asker else {
            self.queue(Message::Pass);
            // A server has said all then. So has a client, unless the server asks.
            self.is_last = true;
            return Ok(None);
        };
        let (spki, not_after) = peer::key_of(self.peer_certificate()?, asker.now())?;
        let mut turn = asker.turn(fingerprint(&spki));
        let turn = match futures_util::poll!(turn.as_mut()) {
            Poll::Ready(turn) => turn?,
            Poll::Pending => {
                // Whoever goes first may have to wait for this very answer, on its connection's other side.
                self.flush().await?;
                turn.await?
            }
        };
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(|_| ChannelError::Setup("no random bytes".into()))?;
        let expected = self.half(self.role.peer(), &nonce).about(&spki)?;
        let resume = if let Turn::Resume(session) = &turn { Some(session.id) } else { None };
        self.queue(Message::Ask { nonce, resume });
        Ok(Some(Asked { spki, not_after, turn, nonce, expected }))
    }

    /// Reads the answer to what was asked.
    async fn judge(&mut self, asker: Option<&dyn Asker>, asked: Option<Asked>) -> Result<Option<Bound>, ChannelError> {
        let (Some(asker), Some(asked)) = (asker, asked) else { return Ok(None) };
        let answer = match self.read().await {
            Err(ChannelError::Session(SessionError::Refused(slug))) if slug == UNATTESTED => {
                return Err(PeerError::NoEvidence.into());
            }
            other => other?,
        };
        let bound = match (answer, asked.turn) {
            (Message::Confirm(tag), Turn::Resume(session)) => {
                if !session.secret.confirms(&asked.expected, &tag) {
                    return Err(SessionError::Confirmation.into());
                }
                Bound { session, resumed: true }
            }
            (Message::Evidence(bytes), turn) => {
                asker.witness(&bytes, &asked.expected);
                let shown = shown(&bytes, asker.model(), &asked.expected, asked.not_after)?;
                let (id, secret) = self.half(self.role.peer(), &asked.nonce).session()?;
                let verdict = asker.appraise(shown.clone()).await;
                let made = verdict.map(|verdict| {
                    let left = verdict.expires_at.duration_since(asker.now()).unwrap_or_default();
                    let (key, until) = (fingerprint(&asked.spki), Instant::now() + left);
                    Arc::new(BoundSession { key, id, secret, shown, verdict: Arc::new(verdict), until })
                });
                match (turn, &made) {
                    (Turn::Lead(lead), made) => land(lead, made),
                    (Turn::Resume(_), Ok(session)) => asker.keep(session.clone()),
                    _ => {}
                }
                Bound { session: made?, resumed: false }
            }
            (other, _) => return Err(SessionError::Unexpected(other.name()).into()),
        };
        still(asker, &bound)?;
        Ok(Some(bound))
    }

    /// Answers what the peer asks, if it asks anything.
    async fn prove(&mut self, prover: Option<Prover<'_>>) -> Result<Option<Proof>, ChannelError> {
        let (nonce, resume) = match self.read().await? {
            Message::Ask { nonce, resume } => (nonce, resume),
            Message::Pass => return Ok(None),
            other => return Err(SessionError::Unexpected(other.name()).into()),
        };
        (self.is_last, self.is_over) = (false, false);
        let Some(prover) = prover else {
            return Err(SessionError::Unattested.into());
        };
        let about = self.half(self.role, &nonce).about(prover.spki)?;
        if let Some(secret) = resume.and_then(|id| prover.proven.secret(&id)) {
            self.queue(Message::Confirm(secret.confirm(&about)));
            return Ok(Some(Proof::Confirmation));
        }
        let bytes = {
            let _place = prover.places.acquire().await.map_err(|_| AttestError::Pending)?;
            prover.attester.credential(&about).await?.to_extension()
        };
        if bytes.len() > super::MAX_EVIDENCE {
            return Err(SessionError::OwnEvidence(bytes.len()).into());
        }
        // Before the evidence leaves: the peer's next connection may refer to it at once.
        let (id, secret) = self.half(self.role, &nonce).session()?;
        prover.proven.keep(id, secret);
        self.queue(Message::Evidence(bytes));
        Ok(Some(Proof::Evidence))
    }

    async fn accepted(&mut self) -> Result<(), ChannelError> {
        match self.read().await? {
            Message::Accept => Ok(()),
            other => Err(SessionError::Unexpected(other.name()).into()),
        }
    }

    fn peer_certificate(&self) -> Result<&CertificateDer<'static>, PeerError> {
        let (_, session) = self.stream.get_ref();
        session.peer_certificates().and_then(|c| c.first()).ok_or(PeerError::NoCertificate)
    }

    fn half<'h>(&'h self, attester: Role, nonce: &'h [u8; NONCE_LEN]) -> Half<'h> {
        Half { stream: self.stream, attester, nonce }
    }

    fn queue(&mut self, message: Message) {
        self.queue.extend(message.encode());
    }

    /// Sends what is queued. Cut off, it leaves the rest of what has begun to leave, which no message may come before.
    async fn write(&mut self) -> std::io::Result<()> {
        self.is_over |= self.is_last;
        self.leaving.append(&mut self.queue);
        while !self.leaving.is_empty() {
            let count = self.stream.write(&self.leaving).await?;
            if count == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            self.leaving.drain(..count);
        }
        self.stream.flush().await
    }

    async fn flush(&mut self) -> Result<(), ChannelError> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let Err(error) = self.write().await else { return Ok(()) };
        // A peer that refused and left has said why before it reset the connection.
        match self.read().await {
            Err(refused @ ChannelError::Session(SessionError::Refused(_))) => Err(refused),
            _ => Err(error.into()),
        }
    }

    async fn read(&mut self) -> Result<Message, ChannelError> {
        match Message::read(self.stream).await?? {
            Message::Refuse(slug) => Err(SessionError::Refused(slug).into()),
            message => Ok(message),
        }
    }
}

/// A peer that took its time may refer to a session that has ended meanwhile.
fn still(asker: &dyn Asker, bound: &Bound) -> Result<(), SessionError> {
    if bound.resumed && !asker.holds(&bound.session) { Err(SessionError::Ended) } else { Ok(()) }
}

/// Waits until the peer's host has what was sent, or the peer has left: the reset that follows throws away the rest.
async fn settled(tcp: &TcpStream) {
    let mut byte = [0];
    let acknowledged = async {
        while crate::os::sys::unacknowledged(tcp.as_fd()).unwrap_or(0) > 0 {
            sleep(SETTLING).await;
        }
    };
    tokio::select! {
        _ = tcp.peek(&mut byte) => {}
        () = acknowledged => {}
    }
}

/// Those who wait are refused with the leader only for what is about the evidence, which theirs would be too.
fn land(lead: Lead, made: &Result<Arc<BoundSession>, ChannelError>) {
    match made {
        Ok(session) => lead.land(Ok(session.clone())),
        Err(error @ ChannelError::Verify(_)) => lead.land(Err(error.clone())),
        Err(_) => drop(lead),
    }
}

/// Evidence out of a message, once it is about this key, this nonce and this connection; or a token, whose binding counts
/// after its signature.
fn shown(
    bytes: &[u8],
    model: Model,
    expected: &RuntimeData,
    not_after: std::time::SystemTime,
) -> Result<PeerCertificate, ChannelError> {
    let credential = Credential::from_extension(bytes).map_err(PeerError::from)?;
    peer::fits(&credential, model)?;
    let shown = PeerCertificate { credential, expected: expected.clone(), not_after };
    let Credential::Evidence(evidence) = &shown.credential else { return Ok(shown) };
    let malformed = EvidenceError::Malformed("runtime data is not an object");
    let found = evidence.runtime_object().ok_or(PeerError::from(malformed))?;
    for (member, error) in
        [(PUBKEY_HASH, SessionError::OtherKey), (NONCE, SessionError::Nonce), (EXPORTER, SessionError::Exporter)]
    {
        if found.get(member) != expected.object().get(member) {
            return Err(error.into());
        }
    }
    Ok(shown)
}
