# What an appraisal in process established about a peer is `input`; tng.toml(5), POLICIES, describes it.
# Name this file in [ingress.verify] or [egress.verify]: rego = "/etc/tng/policy.rego"
package tng

default allow := false

# Firmware images that are trusted. `tngctl status` shows what a refused peer measured.
measurements := {
	"c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3",
	"c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4c4",
}

# A guest on SEV-SNP that runs a trusted image at the highest privilege, on firmware that is new enough.
allow if {
	input.tee == "snp"
	input.claims.measurement in measurements
	input.claims.vmpl == 0
	input.claims.tcb_snp >= 20
}

# A TD whose platform's state was published this year or later. Dates of this form sort as text.
allow if {
	input.tee == "tdx"
	input.claims.mr_td in measurements
	input.claims.tcb_date >= "2026-01-01"
}

# Reasons show in the log and in `tngctl status`, and refuse whatever `allow` says.
deny contains "the peer cannot bind its evidence to the session" if input.bound_to != "session"

deny contains sprintf("the platform has the advisory %v", [advisory]) if {
	some advisory in input.claims.advisories
	not advisory in {"INTEL-SA-00837"}
}
