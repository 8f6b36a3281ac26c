//! Whether a host and a machine can go on with what was kept, and in what they differ. Pure.

use super::{Fit, FitDrive};

/// Two measurements of one counter differ by less.
const TSC_TOLERANCE_PER_MILLE: u64 = 5;
const TSC: &str = "tsc_early_khz=";
/// Of a digest, to tell two builds of one version apart.
const DIGITS: usize = 12;

/// In what the machine that is there differs from the one that a state was taken of; each comes with what its VMM says of
/// its version. The kernel and the initramfs are no matter: the state has its own.
#[must_use]
pub fn differences((taken, then): (&Fit, Option<&str>), (there, now): (&Fit, Option<&str>)) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, taken: &str, there: &str| {
        if taken != there {
            found.push(format!("{what}: {taken} then, {there} now"));
        }
    };
    compare("backend", &taken.backend, &there.backend);
    compare("accelerator", &taken.accelerator, &there.accelerator);
    compare("CPU", &taken.cpu, &there.cpu);
    if taken.vmm != there.vmm {
        let named = |fit: &Fit, version: Option<&str>| {
            format!("{} (BLAKE3 {})", version.unwrap_or("an unknown version"), &fit.vmm.as_str()[..DIGITS])
        };
        let (then, now) = (named(taken, then), named(there, now));
        found.push(format!("the VMM's binary was replaced (by an update?): {then} then, {now} now"));
    }
    found.extend(machine_differences(&taken.machine, &there.machine));
    found.extend(drive_differences(&taken.drives, &there.drives));
    found
}

fn machine_differences(taken: &[String], there: &[String]) -> Vec<String> {
    let only = |these: &[String], those: &[String]| {
        let missing = these.iter().filter(|argument| !those.iter().any(|other| is_same(argument, other)));
        missing.cloned().collect::<Vec<_>>().join(" ")
    };
    let (then, now) = (only(taken, there), only(there, taken));
    let shown = |text: String| if text.is_empty() { "nothing of the kind".to_owned() } else { text };
    match then.is_empty() && now.is_empty() && taken.len() == there.len() {
        true => Vec::new(),
        false => vec![format!("the machine: {} then, {} now", shown(then), shown(now))],
    }
}

/// Command lines may differ in how the frequency of the counter was measured.
fn is_same(one: &str, other: &str) -> bool {
    if one == other {
        return true;
    }
    let (Some((one, khz)), Some((other, other_khz))) = (without_tsc(one), without_tsc(other)) else { return false };
    one == other && khz.abs_diff(other_khz) * 1000 <= khz.max(other_khz) * TSC_TOLERANCE_PER_MILLE
}

fn without_tsc(argument: &str) -> Option<(String, u64)> {
    let (before, rest) = argument.split_once(TSC)?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    Some((before.to_owned() + &rest[end..], rest[..end].parse().ok()?))
}

fn drive_differences(taken: &[FitDrive], there: &[FitDrive]) -> Vec<String> {
    let names = |drives: &[FitDrive]| drives.iter().map(|drive| drive.serial.clone()).collect::<Vec<_>>().join(", ");
    if names(taken) != names(there) {
        return vec![format!("the drives: {} then, {} now", names(taken), names(there))];
    }
    let pairs = taken.iter().zip(there);
    let differ = |(one, other): (&FitDrive, &FitDrive)| {
        if one.size != other.size {
            return Some(format!("drive {}: {} bytes then, {} now", one.serial, one.size, other.size));
        }
        (one.image != other.image).then(|| format!("drive {}: its image was changed", one.serial))
    };
    pairs.filter_map(differ).collect()
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::fit;
    use super::super::Digest;
    use super::*;

    #[test]
    fn test_differences_name_each_part() {
        type Change = fn(&mut Fit);
        let changes: [(&str, Change); 8] = [
            ("backend", |fit| fit.backend.push('x')),
            ("an unknown version", |fit| fit.vmm = Digest::of(b"other")),
            ("accelerator", |fit| fit.accelerator = "kvm".into()),
            ("CPU", |fit| fit.cpu.push('x')),
            ("128M then, 256M now", |fit| fit.machine[1] = "256M".into()),
            ("nothing of the kind then, -x now", |fit| fit.machine.push("-x".into())),
            ("drive disk: 1048576 bytes then, 1048577 now", |fit| fit.drives[0].size += 1),
            ("its image", |fit| fit.drives[0].image = Some(Digest::of(b"image"))),
        ];
        for (named, change) in changes {
            let mut there = fit();
            change(&mut there);
            let found = differences((&fit(), None), (&there, None));
            assert!(found.len() == 1 && found[0].contains(named), "{named}: {found:?}");
        }
    }

    #[test]
    fn test_differences_ignore_the_kernel_and_a_measurement() {
        let with = |khz: &str| Fit { machine: vec!["-append".into(), format!("a tsc_early_khz={khz} b")], ..fit() };
        let other = Fit { kernel: Digest::of(b"other"), initramfs: Digest::of(b"other"), ..fit() };
        let differences = |taken: &Fit, there: &Fit| differences((taken, None), (there, None));
        assert_eq!(differences(&fit(), &other), Vec::<String>::new());
        assert_eq!(differences(&with("2595000"), &with("2600000")), Vec::<String>::new());
        assert_eq!(differences(&with("2595000"), &with("3600000")).len(), 1);
        assert_eq!(differences(&with("2595000"), &fit()).len(), 1);
    }

    #[test]
    fn test_differences_of_the_vmm_name_the_old_and_the_new() {
        let there = Fit { vmm: Digest::of(b"other"), ..fit() };
        let found = differences((&fit(), Some("QEMU 7.2.22")), (&there, Some("QEMU 10.0.13")));
        let digits = |fit: &Fit| fit.vmm.as_str()[..DIGITS].to_owned();
        let (old, new) = (digits(&fit()), digits(&there));
        assert!(
            found[0].ends_with(&format!("QEMU 7.2.22 (BLAKE3 {old}) then, QEMU 10.0.13 (BLAKE3 {new}) now")),
            "{found:?}"
        );
    }
}
