//! What an EAR says (EAT Attestation Result), with the names of draft-fv-rats-ear, as trustee wrote them until it took
//! up draft-ietf-rats-ear-04, and with those of that draft. An EAR has one submodule for each TEE and device.

use serde_json::{Map, Value};

use super::{Expected, Said, policies, shown};
use crate::attest::{Verdict, VerifyError, claims, is_sample_tee, json_contains};

/// What trustee calls its tokens, unless `token_broker.profile_name` is set.
const PROFILE: &str = "tag:github.com,2024:confidential-containers/Trustee";
/// The TEE's submodule; trustee before 0.12 wrote the second.
const CPU: [&str; 2] = ["cpu0", "cpu"];
/// Members of the annotated evidence that do not name a TEE.
const NOT_A_TEE: [&str; 4] = ["report_data", "runtime_data_claims", "init_data", "init_data_claims"];

/// One submodule, whatever its names are.
struct Submod<'a> {
    status: &'a Value,
    policies: Vec<&'a str>,
    /// What the evidence is bound to, if the service checked that.
    runtime_data: Option<&'a Value>,
    tee: &'a str,
    claims: &'a Value,
    /// What the policy made of them.
    vector: Option<&'a Value>,
}

impl<'a> Submod<'a> {
    fn read(submod: &'a Value) -> Result<Self, VerifyError> {
        match (submod.get("ear.status"), submod.get("ear_status")) {
            (Some(status), None) => Self::dotted(submod, status),
            (None, Some(status)) => Self::draft_04(submod, status),
            (None, None) => Err(VerifyError::TokenMalformed("a submodule without status")),
            // Two readers could take different ones.
            (Some(_), Some(_)) => Err(VerifyError::TokenMalformed("a submodule with the names of two drafts")),
        }
    }

    fn dotted(submod: &'a Value, status: &'a Value) -> Result<Self, VerifyError> {
        let policy = submod.get("ear.appraisal-policy-id").and_then(Value::as_str);
        let evidence = submod.get("ear.veraison.annotated-evidence").and_then(Value::as_object);
        let evidence = evidence.ok_or(VerifyError::TokenMalformed("a submodule without evidence"))?;
        let named: Vec<_> = evidence.iter().filter(|(name, _)| !NOT_A_TEE.contains(&name.as_str())).collect();
        let [(tee, claims)] = named[..] else { return Err(VerifyError::TokenMalformed("not one TEE a submodule")) };
        Ok(Self {
            status,
            policies: policy.into_iter().collect(),
            runtime_data: evidence.get("runtime_data_claims"),
            tee,
            claims,
            vector: submod.get("ear.trustworthiness-vector"),
        })
    }

    fn draft_04(submod: &'a Value, status: &'a Value) -> Result<Self, VerifyError> {
        let list = submod.get("ear_appraisal_policy_ids").and_then(Value::as_array);
        let list = list.into_iter().flatten().map(Value::as_str).collect::<Option<Vec<_>>>();
        let attester = submod.get("ear_attester_claims");
        let tee = attester.and_then(|a| a.get("tee")).and_then(Value::as_str);
        Ok(Self {
            status,
            policies: list.ok_or(VerifyError::TokenMalformed("a policy that is no text"))?,
            runtime_data: submod.pointer("/ear_verifier_claims/runtime_data"),
            tee: tee.ok_or(VerifyError::TokenMalformed("not one TEE a submodule"))?,
            claims: attester.and_then(|a| a.get("claims")).unwrap_or(&Value::Null),
            vector: submod.get("ear_trustworthiness_vector"),
        })
    }

    /// AR4SI's word for it, or the number that the word stands for (draft-ietf-rats-ar4si, section 3.2).
    fn affirming(&self, name: &str) -> Result<(), VerifyError> {
        let word = match (self.status.as_str(), self.status.as_u64()) {
            (Some(word), _) => word,
            (None, Some(0)) => "none",
            (None, Some(2)) => "affirming",
            (None, Some(32)) => "warning",
            (None, Some(96)) => "contraindicated",
            _ => "",
        };
        match word {
            "affirming" => Ok(()),
            "none" => Err(VerifyError::TokenStatusNone(name.into())),
            "warning" => Err(VerifyError::TokenStatusWarning(name.into())),
            "contraindicated" => Err(VerifyError::TokenStatusContraindicated(name.into())),
            _ => Err(VerifyError::TokenMalformed("a submodule without a known status")),
        }
    }
}

/// The status of each submodule that can be read; an error for the first that is not affirming.
pub(super) fn status(claims: &Value) -> Result<(), VerifyError> {
    let submods = claims.get("submods").and_then(Value::as_object);
    let mut read = submods.into_iter().flatten().filter_map(|(name, submod)| Some((name, Submod::read(submod).ok()?)));
    read.try_for_each(|(name, submod)| submod.affirming(name))
}

/// Judges what an EAR says.
pub(super) fn appraised(said: &Said<'_>, expected: &Expected<'_>) -> Result<Verdict, VerifyError> {
    // A name and no more: what the token must hold is looked at by itself.
    let profile = said.claims.get("eat_profile").and_then(Value::as_str);
    let profile = profile.ok_or(VerifyError::TokenMalformed("an eat_profile that is no text"))?;
    if !said.claims.contains_key("iat") {
        return Err(VerifyError::TokenMalformed("no time of issue"));
    }
    let submods: &Map<_, _> = said.claims.get("submods").and_then(Value::as_object).ok_or(NO_CPU)?;
    let (cpu_name, cpu) = CPU.iter().find_map(|name| submods.get_key_value(*name)).ok_or(NO_CPU)?;
    let cpu = Submod::read(cpu)?;
    if !json_contains(cpu.runtime_data.unwrap_or(&Value::Null), expected.runtime_data) {
        return Err(VerifyError::TokenRuntimeData);
    }
    let mut found_policies: Vec<String> = Vec::new();
    let mut sample = false;
    // Those that anybody could have shown are not listed.
    let mut devices = Vec::new();
    for (name, submod) in submods {
        let submod = Submod::read(submod)?;
        submod.affirming(name)?;
        if submod.policies.is_empty() {
            return Err(VerifyError::TokenMalformed("a submodule without policy"));
        }
        for policy in submod.policies {
            if !found_policies.iter().any(|found| found == policy) {
                found_policies.push(policy.to_owned());
            }
        }
        // Evidence of a device that is bound to something must be bound to this peer.
        let bound = submod.runtime_data.filter(|data| !data.is_null());
        if bound.is_some_and(|data| !json_contains(data, expected.runtime_data)) {
            return Err(VerifyError::TokenRuntimeData);
        }
        if is_sample_tee(submod.tee) {
            if !expected.allow_sample {
                return Err(VerifyError::SampleTeeRefused(submod.tee.into()));
            }
            sample = true;
        }
        if name != cpu_name && bound.is_some() {
            devices.push(submod.tee.to_owned());
        }
    }
    policies(&found_policies, expected.policy_ids)?;
    let mut claims = claims::with_vector(cpu.claims, cpu.vector);
    if profile != PROFILE {
        claims.insert("eat_profile".into(), shown(profile));
    }
    Ok(Verdict {
        claims,
        status: "affirming".into(),
        devices,
        tee: cpu.tee.into(),
        policy_ids: found_policies,
        verifier: "as".into(),
        trust_anchor: said.trust_anchor.into(),
        sample,
        appraised_at: said.now,
        expires_at: said.expires_at,
    })
}

const NO_CPU: VerifyError = VerifyError::TokenMalformed("no submodule cpu0");
