//! What a check found.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Good to know, or not checked.
    Note,
    /// It works now; something may break it, or weakens it.
    Warning,
    /// Captured traffic is refused, or is not protected as configured.
    Error,
}

macro_rules! checks {
    ($($variant:ident = $slug:literal in $group:literal,)*) => {
        /// A check. Its slug never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs)] // tngctl(1) says what each looks at
        pub enum Check { $($variant,)* }

        impl Check {
            /// All of them, in the order in which they are shown.
            pub const ALL: &[Check] = &[$(Check::$variant,)*];

            /// The stable id.
            pub fn id(self) -> &'static str {
                match self { $(Check::$variant => $slug,)* }
            }

            /// The heading it is shown under.
            pub fn group(self) -> &'static str {
                match self { $(Check::$variant => $group,)* }
            }
        }
    };
}

checks! {
    KernelVersion = "kernel-version" in "kernel",
    NftProgram = "nft-program" in "kernel",
    NftTproxy = "nft-tproxy" in "kernel",
    NftSocket = "nft-socket" in "kernel",
    NftFib = "nft-fib" in "kernel",
    NftConntrack = "nft-conntrack" in "kernel",
    NftReject = "nft-reject" in "kernel",
    NftNat = "nft-nat" in "kernel",
    NftOwner = "nft-owner" in "kernel",
    NftCgroup = "nft-cgroup" in "kernel",
    Ipv6OnLo = "ipv6-on-lo" in "settings",
    FwmarkAccept = "fwmark-accept" in "settings",
    Somaxconn = "somaxconn" in "settings",
    ConntrackTable = "conntrack-table" in "settings",
    Ptrace = "ptrace-scope" in "settings",
    NetworkdRules = "networkd-rules" in "other software",
    PolicyRules = "policy-rules" in "other software",
    OwnMarks = "own-marks" in "other software",
    MarkWriters = "mark-writers" in "other software",
    FilterRules = "filter-rules" in "other software",
    Docker = "docker" in "other software",
    Firewalld = "firewalld" in "other software",
    LegacyTables = "legacy-tables" in "other software",
    FlushRuleset = "flush-ruleset" in "other software",
    SavedRules = "saved-rules" in "other software",
    CgroupLayout = "cgroup-layout" in "cgroups",
    CgroupSlice = "cgroup-slice" in "cgroups",
    SystemdVersion = "systemd-version" in "systemd",
    UnitState = "unit-state" in "systemd",
    UnitEnabled = "unit-enabled" in "systemd",
    UnitRestarts = "unit-restarts" in "systemd",
    UnitStale = "unit-stale" in "systemd",
    UnitSandbox = "unit-sandbox" in "systemd",
    User = "user" in "instance",
    ConfigValid = "config-valid" in "instance",
    ConfigAccess = "config-access" in "instance",
    GuardAccess = "guard-access" in "instance",
    InstanceConflicts = "instance-conflicts" in "instance",
    ConfigApplied = "config-applied" in "instance",
    RulesPresent = "rules-present" in "instance",
    RoutesPresent = "routes-present" in "instance",
    GuardRunning = "guard-running" in "instance",
    GuardTable = "guard-table" in "instance",
    TrialSyn = "trial-syn" in "trial",
    AaSocket = "aa-socket" in "attestation",
    AaAccess = "aa-access" in "attestation",
    AaAnswer = "aa-answer" in "attestation",
    EvidenceHelper = "evidence-helper" in "attestation",
    Tee = "tee" in "attestation",
    SampleEvidence = "sample-evidence" in "attestation",
    AsAnswer = "as-answer" in "attestation",
    AsClock = "as-clock" in "attestation",
    Collateral = "collateral" in "attestation",
    CollateralService = "collateral-service" in "attestation",
    ClockYear = "clock-year" in "clock",
    ClockSynchronised = "clock-synchronised" in "clock",
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Who found it.
    pub check: Check,
    /// How bad it is.
    pub severity: Severity,
    /// The instance it is about; `None`: the host.
    pub instance: Option<String>,
    /// What was found.
    pub what: String,
    /// Why it matters; empty when all is well.
    pub why: String,
    /// The command that mends it, to be pasted into root's shell; empty when there is nothing to mend.
    pub fix: String,
}

impl Finding {
    fn new(check: Check, severity: Severity, what: impl Into<String>) -> Self {
        Self { check, severity, instance: None, what: what.into(), why: String::new(), fix: String::new() }
    }
    /// All is well.
    pub fn ok(check: Check, what: impl Into<String>) -> Self {
        Self::new(check, Severity::Ok, what)
    }
    /// Good to know.
    pub fn note(check: Check, what: impl Into<String>) -> Self {
        Self::new(check, Severity::Note, what)
    }
    /// Works for now.
    pub fn warning(check: Check, what: impl Into<String>) -> Self {
        Self::new(check, Severity::Warning, what)
    }
    /// Broken.
    pub fn error(check: Check, what: impl Into<String>) -> Self {
        Self::new(check, Severity::Error, what)
    }
    /// The caller may not look.
    pub fn needs_root(check: Check) -> Self {
        Self::note(check, "not checked: needs root")
    }
    /// The reason to care.
    #[must_use]
    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }
    /// The command.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }
    /// The instance.
    #[must_use]
    pub fn of(mut self, instance: &str) -> Self {
        self.instance = Some(instance.to_owned());
        self
    }
}

impl Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut object = serializer.serialize_struct("Finding", 7)?;
        object.serialize_field("id", self.check.id())?;
        object.serialize_field("severity", &self.severity)?;
        object.serialize_field("group", self.check.group())?;
        object.serialize_field("instance", &self.instance)?;
        object.serialize_field("what", &self.what)?;
        object.serialize_field("why", &self.why)?;
        object.serialize_field("fix", &self.fix)?;
        object.end()
    }
}
