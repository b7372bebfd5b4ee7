//! The file as written: every table and key there is, with positions, nothing checked but types.

use toml::de::DeValue;

use super::check_builtin::OneOrMore;
use super::diagnostics::{Place, Sink};
use super::reader::{self, At, Free, FromToml, Hidden, OneOrMany, Scalar, raw_table};

raw_table! {
    /// The whole file.
    RawFile {
        on_stop: String,
        drain_timeout: String,
        control: RawControl,
        ingress: Vec<At<RawEndpoint>>,
        egress: Vec<At<RawEndpoint>>,
    } later {}
}

raw_table! {
    /// `[control]`
    RawControl { listen: String, } later {}
}

raw_table! {
    /// `[[ingress]]` or `[[egress]]`
    RawEndpoint {
        name: String,
        no_ra: bool,
        require_session_binding: bool,
        mapping: RawMapping,
        netfilter: RawNetfilter,
        attest: RawAttest,
        verify: RawVerify,
        limits: RawLimits,
    } later { "http_proxy", "socks5", "multiplex", "ohttp", "tls", "direct_forward" }
}

raw_table! {
    /// `[*.mapping]`
    RawMapping { listen: String, target: String, so_mark: i64, } later {}
}

raw_table! {
    /// `[*.netfilter]`
    RawNetfilter {
        capture: Vec<At<RawMatch>>,
        exclude: Vec<At<RawMatch>>,
        capture_local_traffic: bool,
        preserve_source: bool,
        preserve_source_ports: Scalar,
        so_mark: i64,
        listen_port: Scalar,
    } later {}
}

raw_table! {
    /// One entry of `capture` or `exclude`
    RawMatch { to: String, port: Scalar, uid: Scalar, gid: Scalar, cgroup: String, iif: String, } later { "set" }
}

raw_table! {
    /// `[*.attest]`
    RawAttest {
        provider: String,
        aa_addr: String,
        asr_addr: String,
        asr_insecure: bool,
        additional_evidence: bool,
        refresh_interval: String,
        model: String,
        as_addr: OneOrMany,
        as_type: String,
        as_ca: OneOrMany,
        policy_ids: Vec<At<String>>,
        as_headers: Free<Hidden>,
        as_insecure: bool,
        as_timeout: String,
        evidence_addr: String,
        tsm_root: String,
        tpm_device: String,
        tpm_ak: String,
        tpm_hierarchy: String,
        tpm_pcrs: Vec<At<i64>>,
    } later {}
}

raw_table! {
    /// `[*.verify]`
    RawVerify {
        provider: String,
        model: String,
        as_addr: OneOrMany,
        as_type: String,
        as_ca: OneOrMany,
        policy_ids: Vec<At<String>>,
        trusted_certs: Vec<At<String>>,
        trusted_keys: Vec<At<String>>,
        trusted_jwks: OneOrMany,
        as_headers: Free<Hidden>,
        allow_sample: bool,
        verdict_ttl: String,
        grace: String,
        as_insecure: bool,
        as_timeout: String,
        collateral: Vec<At<String>>,
        pccs_addr: String,
        minimum_tcb: Vec<At<String>>,
        amd_certs: Vec<At<String>>,
        kds_addr: String,
        allow_debug: bool,
        fetch_timeout: String,
        reference: Vec<At<Free<OneOrMore>>>,
        rego: String,
        require_session_binding: bool,
    } later {}
}

raw_table! {
    /// `[*.limits]`
    RawLimits {
        max_connections: i64,
        handshake_timeout: String,
        first_byte_timeout: String,
        connect_timeout: String,
        idle_timeout: String,
        unacknowledged_timeout: String,
    } later {}
}
