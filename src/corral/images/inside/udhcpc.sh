#!/bin/sh
# What udhcpc calls with a lease. An address that somebody has set meanwhile (the agent) stays.
case $1 in
  bound)
    [ -n "$(ip -4 addr show dev "$interface" | grep inet)" ] && exit 0
    ip addr add "$ip/${mask:-24}" dev "$interface"
    [ -n "$router" ] && ip route add default via "${router%% *}"
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    ;;
esac
