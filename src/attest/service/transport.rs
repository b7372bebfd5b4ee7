//! What both transports share: marked sockets, TLS roots, headers, and what their failures mean.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use zeroize::Zeroizing;

use crate::config::Mark;
use crate::relay::{Dialer, MarkPolicy, probe_mark};

/// A dialer whose sockets carry `mark`, so that a capture on this host never takes them. A process that may not mark
/// goes without, since no capture depends on it.
pub fn dialer(mark: Mark, timeout: Duration) -> Result<Dialer, String> {
    let mark = match probe_mark(mark) {
        Ok(()) => MarkPolicy::Required(mark),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => MarkPolicy::Unmarked,
        Err(e) => return Err(format!("cannot mark a socket: {e}")),
    };
    // A dead address leaves time for the next one.
    Ok(Dialer { mark, connect_timeout: timeout / 3, unacknowledged_timeout: Duration::ZERO })
}

/// Whose authorities a service's certificate is checked against.
#[derive(Clone, Copy)]
pub enum Roots<'a> {
    /// None: nothing is asked over TLS.
    Unused,
    /// These PEM files alone; the system's when there are none.
    Own(&'a [PathBuf]),
    /// The system's and these.
    SystemAnd(&'a [PathBuf]),
}

/// TLS towards a service, without ALPN.
pub fn tls(roots: Roots<'_>) -> Result<ClientConfig, String> {
    let mut store = RootCertStore::empty();
    let (system, files) = match roots {
        Roots::Unused => (false, &[][..]),
        Roots::Own(files) => (files.is_empty(), files),
        Roots::SystemAnd(files) => (true, files),
    };
    // Loading the system's roots costs 35 ms; a plain-http service needs none.
    if system {
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if store.is_empty() && files.is_empty() {
            return Err("the service is https and the system has no root certificates".into());
        }
    }
    for file in files {
        let at = |e: &dyn std::fmt::Display| format!("as_ca: {}: {e}", file.display());
        let text = std::fs::read(file).map_err(|e| at(&e))?;
        for der in CertificateDer::pem_slice_iter(&text) {
            store.add(der.map_err(|e| at(&e))?).map_err(|e| at(&e))?;
        }
    }
    Ok(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(store)
        .with_no_client_auth())
}

/// `as_headers`: on REST headers, on gRPC metadata. Values are wiped on drop and appear in no output.
#[derive(Default)]
pub struct Headers(Vec<(HeaderName, Zeroizing<Vec<u8>>)>);

impl Headers {
    /// The checked pairs of a configuration.
    pub fn new(pairs: &[(String, String)]) -> Result<Self, String> {
        let one = |(name, value): &(String, String)| {
            // The value is not named in the error: it may be secret.
            let illegal = || format!("as_headers: \"{name}\" is not a legal header");
            HeaderValue::from_str(value).map_err(|_| illegal())?;
            let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| illegal())?;
            Ok((parsed, Zeroizing::new(value.as_bytes().to_vec())))
        };
        pairs.iter().map(one).collect::<Result<_, String>>().map(Self)
    }

    /// Adds them to a request's.
    pub fn add_to(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.0 {
            // Checked when the configuration was read.
            let Ok(mut value) = HeaderValue::from_bytes(value) else { continue };
            value.set_sensitive(true);
            headers.append(name, value);
        }
    }
}

/// Whether TLS is at the root of an error. An [`std::io::Error`] hides what it wraps from `source`.
pub fn is_tls(e: &(dyn std::error::Error + 'static)) -> bool {
    let wrapped = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    e.is::<rustls::Error>() || wrapped.is_some_and(|inner| is_tls(inner))
}
