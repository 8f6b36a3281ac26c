//! What a host tells its guest's agent on the kernel's command line: how this VMM differs from QEMU.
//!
//! The kernel takes a name with a dot for a setting of a module and leaves it alone. Nothing here is a secret, and nothing
//! depends on which VM it is.

/// The vsock port, on the host, to which the agent connects; without it the agent opens its virtio-serial port.
const PORT: &str = "microvm.vsock_port";
/// The serial numbers of the drives `vda`, `vdb` and so on, for a VMM that gives drives none of its own choice.
const DRIVES: &str = "microvm.drives";
/// The guest ends by power-off: to this VMM a reboot means to boot again.
const POWER_OFF: &str = "microvm.power_off";

/// The host's side and the guest's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    pub vsock_port: Option<u32>,
    pub drives: Vec<String>,
    pub power_off: bool,
}

impl Machine {
    /// The parameters for the command line.
    #[must_use]
    pub fn to_cmdline(&self) -> String {
        let mut parameters = Vec::new();
        parameters.extend(self.vsock_port.map(|port| format!("{PORT}={port}")));
        if !self.drives.is_empty() {
            parameters.push(format!("{DRIVES}={}", self.drives.join(",")));
        }
        parameters.extend(self.power_off.then(|| format!("{POWER_OFF}=1")));
        parameters.join(" ")
    }

    /// What `/proc/cmdline` says; parameters of others are left alone.
    #[must_use]
    pub fn from_cmdline(cmdline: &str) -> Self {
        let mut machine = Self::default();
        for (name, value) in cmdline.split_whitespace().filter_map(|parameter| parameter.split_once('=')) {
            match name {
                PORT => machine.vsock_port = value.parse().ok(),
                DRIVES => machine.drives = value.split(',').map(str::to_owned).collect(),
                POWER_OFF => machine.power_off = value == "1",
                _ => {}
            }
        }
        machine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_machine_survives_the_command_line() {
        let machine = Machine { vsock_port: Some(5005), drives: vec!["config".into(), "disk".into()], power_off: true };
        let cmdline = format!("console=ttyS0 quiet {} panic=-1", machine.to_cmdline());
        assert_eq!(Machine::from_cmdline(&cmdline), machine);
    }

    #[test]
    fn test_plain_command_line_is_the_default_machine() {
        assert_eq!(Machine::from_cmdline("console=ttyS0 quiet\n"), Machine::default());
        assert_eq!(Machine::default().to_cmdline(), "");
    }
}
