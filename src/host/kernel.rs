//! Which kernel this is.

use nix::sys::utsname::uname;

/// Whether it is of this release or a later one.
#[must_use]
pub fn is_at_least(major: u32, minor: u32) -> bool {
    let release = uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    parse(&release).is_some_and(|release| release >= (major, minor))
}

/// The first two numbers, as of `6.1.0-18-amd64` or `5.9-rc1`.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_reads_two_numbers() {
        assert_eq!(parse("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse("5.10-rc1"), Some((5, 10)));
        assert_eq!(parse("next"), None);
    }

    #[test]
    fn test_is_at_least_compares_numbers() {
        assert!(is_at_least(3, 10) && !is_at_least(1000, 0));
    }
}
