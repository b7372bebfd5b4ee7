//! TLS as one deploys it with rustls: an authority, a certificate for each side, chains verified by webpki.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tng::tls::crypto_provider;

use crate::Outcome;
use crate::ends::{Ends, SERVER_NAME};
use crate::ways::Way;

/// Ends for one of the plain ways. Keys are P-256, as tng's are; primitives are tng's own; the leaf is signed by the
/// root itself, so the chain costs one signature.
pub fn ends(way: Way) -> Outcome<Ends> {
    let provider = crypto_provider();
    let authority = authority()?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.der)?;
    let roots = Arc::new(roots);
    let server = leaf(&authority.issuer, ExtendedKeyUsagePurpose::ServerAuth)?;
    let client = leaf(&authority.issuer, ExtendedKeyUsagePurpose::ClientAuth)?;

    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = if way == Way::ServerOnly {
        builder.with_no_client_auth()
    } else {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        builder.with_client_cert_verifier(verifier)
    };
    let mut server = builder.with_single_cert(vec![server.0], server.1)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut client = if way == Way::ServerOnly {
        builder.with_no_client_auth()
    } else {
        builder.with_client_auth_cert(vec![client.0], client.1)?
    };
    if !way.resumes() {
        // Tickets that nobody uses would only make the handshake dearer.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        client.resumption = Resumption::disabled();
    }
    server.alpn_protocols = vec![b"bench".to_vec()];
    client.alpn_protocols = vec![b"bench".to_vec()];
    Ok(Ends::Plain { client: Arc::new(client).into(), server: Arc::new(server).into() })
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

fn authority() -> Outcome<Authority> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "bench authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let der = params.self_signed(&key)?.der().clone();
    Ok(Authority { issuer: Issuer::new(params, key), der })
}

fn leaf(
    issuer: &Issuer<'static, KeyPair>,
    purpose: ExtendedKeyUsagePurpose,
) -> Outcome<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    params.extended_key_usages = vec![purpose];
    let certificate = params.signed_by(&key, issuer)?;
    Ok((certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der())?))
}
