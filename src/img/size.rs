//! Sizes as QEMU reads and prints them.

/// Why a text is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoSize {
    /// It is not a number with a suffix.
    Malformed,
    /// It is 8 EiB or more.
    TooLarge,
}

/// Bytes of a number with an optional fraction and suffix (`b`, `k`, `M`, `G`, `T`, `P`, `E`: powers of 1024); hex
/// numbers take none. `default` is the unit where there is no suffix.
pub fn parse_unit(text: &str, default: u64) -> Result<u64, NoSize> {
    let text = text.trim_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    let limit = |bytes: u128| {
        if bytes > i64::MAX as u128 { Err(NoSize::TooLarge) } else { Ok(bytes as u64) }
    };
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let all_hex = !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit());
        if !all_hex {
            return Err(NoSize::Malformed);
        }
        let value = u128::from_str_radix(hex, 16).map_err(|_| NoSize::TooLarge)?;
        return limit(value.saturating_mul(default.into()));
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = text.split_at(digits);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count()),
        None => ("", rest),
    };
    if digits == 0 && fraction.is_empty() {
        return Err(NoSize::Malformed);
    }
    let unit: u64 = match suffix {
        "" => default,
        "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return Err(NoSize::Malformed),
    };
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| NoSize::TooLarge)? };
    let part: f64 = format!("0.{fraction}").parse().map_err(|_| NoSize::Malformed)?;
    if unit == 1 && part != 0.0 {
        return Err(NoSize::Malformed);
    }
    // Halves round to the even number, as the C library does.
    #[allow(clippy::cast_precision_loss, clippy::cast_sign_loss)] // the fraction of a unit
    let part = (part * unit as f64 + 0.5) as u128;
    limit(whole.saturating_mul(unit.into()).saturating_add(part))
}

/// The same in bytes.
pub fn parse(text: &str) -> Result<u64, NoSize> {
    parse_unit(text, 1)
}

/// Bytes for people, three digits: `1.5 MiB`.
#[allow(clippy::cast_precision_loss)] // three digits are shown
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // The next unit from 1000 on, so that there are never four digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS.get(unit).copied().unwrap_or(""))
}

/// `%0.3g`.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:.2e}");
    let exponent: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    if exponent >= 3 {
        let (mantissa, _) = scientific.split_once('e').unwrap_or((&scientific, ""));
        return format!("{}e+{exponent:02}", trim(mantissa));
    }
    let decimals = usize::try_from(2 - exponent).unwrap_or(0);
    trim(&format!("{value:.decimals$}")).to_owned()
}

fn trim(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1025", 1025),
            ("1k", 1024),
            ("1.5M", 3 << 19),
            ("0x1000", 4096),
            ("2T", 2 << 40),
            (".5k", 512),
            ("1b", 1),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "1Z", "1kk", "-1", "1.5", "0x", "0x1k", "1 M"] {
            assert_eq!(parse(text), Err(NoSize::Malformed), "{text}");
        }
        assert_eq!(parse("8E"), Err(NoSize::TooLarge));
        assert_eq!(parse("99999999999999999999999999999999999999999"), Err(NoSize::TooLarge));
    }

    #[test]
    fn sizes_are_printed_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (655_872, "640 KiB"),
            (3 << 19, "1.5 MiB"),
            (1 << 40, "1 TiB"),
            (i64::MAX as u64, "8 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
