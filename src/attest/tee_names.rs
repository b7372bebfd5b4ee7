//! Names of TEEs, which not everybody spells alike.

/// TEEs with two spellings: upstream's (kbs-types, and with it the agent and trustee's REST API), and the one of TNG 2.8,
/// of the openanolis line and of some releases' gRPC.
pub(super) const SPELLINGS: [(&str, &str); 2] = [("az-snp-vtpm", "azsnpvtpm"), ("az-tdx-vtpm", "aztdxvtpm")];

/// As the certificate extension has it, whose other reader is TNG 2.8: it refuses a name that it does not know.
pub(super) fn of_certificate(tee: &str) -> &str {
    SPELLINGS.iter().find(|(long, _)| *long == tee).map_or(tee, |(_, short)| short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_has_the_names_that_tng_knows() {
        for (name, written) in [
            ("az-snp-vtpm", "azsnpvtpm"),
            ("az-tdx-vtpm", "aztdxvtpm"),
            ("aztdxvtpm", "aztdxvtpm"),
            ("tdx", "tdx"),
            ("sampledevice", "sampledevice"),
        ] {
            assert_eq!(of_certificate(name), written);
        }
    }
}
