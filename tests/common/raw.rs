//! A peer made of rustls and the messages of `tng/1` alone, so that a test decides what it says. It is written from
//! docs/tng-1.md, apart from the endpoints' own state machine.
#![allow(dead_code)]

use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, CustomExtension, KeyPair, PublicKeyData};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tng::attest::{Attester, EVIDENCE_OID, Evidence, RuntimeData, SampleAttester};
use tng::tls::session::{EVIDENCE_LABEL, ID_LABEL, Message, Role, SECRET_LABEL, Secret, SessionId, context};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// A key and its certificate with evidence: what a TEE has, and what a thief of the key has too.
pub struct Keys {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl Keys {
    pub async fn new() -> Arc<Self> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let spki = key.subject_public_key_info();
        let evidence = SampleAttester.evidence(&RuntimeData::for_key(&spki)).await.unwrap();
        let now = std::time::SystemTime::now();
        let mut params = CertificateParams::default();
        params.not_before = now.into();
        params.not_after = (now + Duration::from_secs(3600)).into();
        params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, evidence.to_extension())];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Arc::new(Self { key, certificate })
    }

    pub fn spki(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// Evidence about the key alone, as it stands in the certificate.
    pub async fn evidence(&self) -> Evidence {
        SampleAttester.evidence(&RuntimeData::for_key(&self.spki())).await.unwrap()
    }

    /// As a server that speaks `alpn`. rustls resumes what one configuration has seen.
    pub fn server(&self, alpn: &[&str]) -> rustls::ServerConfig {
        let signer = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], signer.into())
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        config
    }

    /// As a server over `tcp`.
    pub async fn accept(&self, tcp: TcpStream, alpn: &[&str]) -> std::io::Result<Raw> {
        self.accept_as(Arc::new(self.server(alpn)), tcp).await
    }

    /// The same with this configuration.
    pub async fn accept_as(&self, config: Arc<rustls::ServerConfig>, tcp: TcpStream) -> std::io::Result<Raw> {
        let stream = TlsAcceptor::from(config).accept(tcp).await?;
        Ok(Raw { stream: stream.into(), spki: self.spki() })
    }

    /// As a client that speaks `alpn` and shows no ticket.
    pub fn client(&self, alpn: &[&str]) -> rustls::ClientConfig {
        let signer = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_client_auth_cert(vec![self.certificate.clone()], signer.into())
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        config.resumption = rustls::client::Resumption::disabled();
        config
    }

    /// As a client over `tcp`.
    pub async fn connect(&self, tcp: TcpStream, alpn: &[&str]) -> std::io::Result<Raw> {
        self.connect_as(Arc::new(self.client(alpn)), tcp).await
    }

    /// The same with this configuration.
    pub async fn connect_as(&self, config: Arc<rustls::ClientConfig>, tcp: TcpStream) -> std::io::Result<Raw> {
        let name = "tng.test".try_into().unwrap();
        let stream = TlsConnector::from(config).connect(name, tcp).await?;
        Ok(Raw { stream: stream.into(), spki: self.spki() })
    }
}

/// One end of a connection.
pub struct Raw {
    pub stream: TlsStream<TcpStream>,
    spki: Vec<u8>,
}

impl Raw {
    pub async fn bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub async fn say(&mut self, message: Message) {
        self.bytes(&message.encode()).await;
    }

    pub async fn hear(&mut self) -> Message {
        Message::read(&mut self.stream).await.unwrap().unwrap()
    }

    /// The nonce and the session of the peer's question.
    pub async fn asked(&mut self) -> ([u8; 32], Option<SessionId>) {
        match self.hear().await {
            Message::Ask { nonce, resume } => (nonce, resume),
            other => panic!("{other:?}"),
        }
    }

    fn role(&self) -> Role {
        if matches!(self.stream, TlsStream::Client(_)) { Role::Client } else { Role::Server }
    }

    fn export<const N: usize>(&self, label: &[u8], attester: Role, nonce: &[u8; 32]) -> [u8; N] {
        let context = context(attester, nonce);
        match &self.stream {
            TlsStream::Client(s) => s.get_ref().1.export_keying_material([0; N], label, Some(&context)),
            TlsStream::Server(s) => s.get_ref().1.export_keying_material([0; N], label, Some(&context)),
        }
        .unwrap()
    }

    /// What evidence in this connection has to be about.
    pub fn about(&self, nonce: &[u8; 32]) -> RuntimeData {
        RuntimeData::for_session(&self.spki, nonce, &self.export(EVIDENCE_LABEL, self.role(), nonce))
    }

    /// Name and secret of the session that evidence about `nonce` binds here.
    pub fn session(&self, nonce: &[u8; 32]) -> (SessionId, Secret) {
        let role = self.role();
        (SessionId(self.export(ID_LABEL, role, nonce)), Secret::new(self.export(SECRET_LABEL, role, nonce)))
    }

    /// True evidence about `nonce` in this connection: what the TEE alone can make.
    pub async fn evidence(&self, nonce: &[u8; 32]) -> Evidence {
        SampleAttester.evidence(&self.about(nonce)).await.unwrap()
    }

    /// Until the peer ends the connection, and what it says before: the reason of its refusal.
    pub async fn refusal(&mut self) -> Option<String> {
        loop {
            match Message::read(&mut self.stream).await {
                Ok(Ok(Message::Refuse(slug))) => return Some(slug),
                Ok(Ok(_)) => {}
                _ => return None,
            }
        }
    }
}

pub fn message(evidence: &Evidence) -> Message {
    Message::Evidence(evidence.to_extension())
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
