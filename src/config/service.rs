//! An Attestation Service as configured: where it is, what it speaks, whom to believe.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

/// How long one appraisal may take in all, unless `as_timeout` says otherwise.
pub(super) const DEFAULT_AS_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach an Attestation Service and whom to believe.
#[derive(Clone, PartialEq)]
pub struct AsService {
    /// Base URLs, each ending in a slash, in the order they are asked in. At least one.
    pub addrs: Vec<Url>,
    /// What the addresses speak; `None`: found out at each.
    pub kind: Option<AsKind>,
    /// Headers or gRPC metadata sent with every request (values may be secret: never printed).
    pub headers: Vec<(String, String)>,
    /// PEM files of the authorities of the service's own TLS certificate. Empty: the system's.
    pub ca: Vec<PathBuf>,
    /// Who may sign its tokens.
    pub trusted: TrustedSigners,
    /// How long one appraisal may take in all, over all addresses.
    pub timeout: Duration,
}

/// What an Attestation Service speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsKind {
    /// JSON over HTTP (`restful-as`).
    Rest,
    /// gRPC (`grpc-as`).
    Grpc,
}

impl AsKind {
    /// As `as_type` is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rest => "rest",
            Self::Grpc => "grpc",
        }
    }
}

/// Trust anchors of a token's signer; what is listed adds up. All empty: the service is asked who signs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrustedSigners {
    /// PEM files with certificates.
    pub certs: Vec<PathBuf>,
    /// Pinned keys.
    pub keys: Vec<KeyPin>,
    /// JSON Web Key Sets.
    pub jwks: Vec<JwksSource>,
}

impl TrustedSigners {
    /// The PEM files and nothing else.
    pub fn certs(files: Vec<PathBuf>) -> Self {
        Self { certs: files, ..Self::default() }
    }
    /// Whether nobody is named.
    pub fn is_empty(&self) -> bool {
        self.certs.is_empty() && self.keys.is_empty() && self.jwks.is_empty()
    }
    /// Files named.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let sets = self.jwks.iter().filter_map(|j| if let JwksSource::File(f) = j { Some(f) } else { None });
        self.certs.iter().chain(sets)
    }
}

/// SHA-256 of a DER SubjectPublicKeyInfo (RFC 7469 section 2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyPin(pub [u8; 32]);

/// Where a JSON Web Key Set is.
#[derive(Debug, Clone, PartialEq)]
pub enum JwksSource {
    /// A file, read at start and at reload.
    File(PathBuf),
    /// A URL, fetched when needed and again every ten minutes.
    Url(Url),
}

impl fmt::Display for JwksSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

impl AsService {
    /// The service at `addr` with every default.
    pub fn at(addr: Url) -> Self {
        Self {
            addrs: vec![addr],
            kind: None,
            headers: Vec::new(),
            ca: Vec::new(),
            trusted: TrustedSigners::default(),
            timeout: DEFAULT_AS_TIMEOUT,
        }
    }

    /// Files it names.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.ca.iter().chain(self.trusted.files())
    }
}

impl fmt::Debug for AsService {
    /// Header values may be secret: only their names are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        let addrs: Vec<&str> = self.addrs.iter().map(Url::as_str).collect();
        let Self { kind, ca, trusted, timeout, .. } = self;
        f.debug_struct("AsService")
            .field("addrs", &addrs)
            .field("kind", kind)
            .field("headers", &names)
            .field("ca", ca)
            .field("trusted", trusted)
            .field("timeout", timeout)
            .finish()
    }
}
